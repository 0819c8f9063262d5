"""The package as a user sees it: help(), reprs, and errors if torch is missing."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from collections.abc import Callable

import shardloss

WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Block())
import shardloss
from shardloss.types import TableInfo
table = object.__new__(shardloss.Table)
for call in (table.softmax, table.sampled_softmax, table.nce, table.sigmoid, table.margin_softmax,
             lambda: table.logits(None), lambda: __import__("shardloss.compat.paddle")):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""


def test_what_needs_torch_names_the_extra_that_installs_it() -> None:
    """Each head, lazy logits and shardloss.compat name the extra in a process in which torch cannot be found."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 7, done.stdout + done.stderr
    assert all("pip install 'shardloss[torch]'" in line for line in lines), lines


def test_help_shows_the_public_api() -> None:
    """help() lists every public class under the name that users import, and no internal method."""
    page = pydoc.plain(pydoc.render_doc(shardloss))
    classes = page.split("\nCLASSES\n")[1].split("\nFUNCTIONS\n")[0]
    listed = set(re.findall(r"^    class (\w+)\(", classes, re.M))
    assert listed == {name for name in shardloss.__all__ if isinstance(getattr(shardloss, name), type)}
    for internal in ("_watch", "_attach", "_send_loss", "_begin_commit", "_skip", "_write_counts_page"):
        assert f"{internal}(" not in page
    assert "connect(" in page


def test_reprs_say_server_name_and_version(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """A session's repr shows the digest from the server's log, not its name, with which others could commit steps."""
    table = client.create_table(fresh_name(), num_classes=11, dim=3)
    session = table.session()
    assert repr(client) == f"<LossClient {client.address}, server {client.info.version}>"
    assert repr(table) == f"<Table {table.name!r} on {client.address}, 11 x 3 float32, version 0 when opened>"
    assert f"of table {table.name!r} on {client.address}, step 1, opened at version 0>" in repr(session)
    assert session.name not in repr(session)
