"""Export and import of tables, page by page: rows, biases, optimizer state, step and class counts (docs/files.md).

    shardloss.files.export_table(client.table("words"), "words.safetensors")
    shardloss.files.import_table(client, "words.safetensors", "words", num_shards=8)

Never more than one page of a table is in memory. Importing this package needs only NumPy.
"""

from shardloss.files.exporting import Exported, export_table
from shardloss.files.importing import import_table
from shardloss.files.opening import Opened, open_file
from shardloss.files.stored import Stored

__all__ = ["Exported", "Opened", "Stored", "export_table", "import_table", "open_file"]
