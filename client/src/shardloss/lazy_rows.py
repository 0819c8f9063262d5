"""A lookup of table rows that is never fetched: what a loss takes in place of an embedding's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument
from shardloss.wire import Array

if TYPE_CHECKING:
    from torch import Tensor

    from shardloss.table import Table


@dataclass(frozen=True, slots=True, eq=False)
class LazyRows:
    """The rows [C, D] of class_ids [C] of a table, repeats allowed, as they are whenever a loss scores them.

    Made by `Table.embeddings`; nothing is fetched. `Table.read_rows` reads the numbers.
    """

    table: Table
    class_ids: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(C, D)."""
        return len(self.class_ids), self.table.spec.dim

    def __len__(self) -> int:
        return len(self.class_ids)


def lazy_rows(table: Table, class_ids: Array | Tensor) -> LazyRows:
    """A lookup of class_ids [C], NumPy's or a tensor on any device.

    Raises:
        InvalidArgument: they are not a list of class ids of the table.
    """
    on_host: Any = getattr(class_ids, "cpu", lambda: class_ids)()
    ids = np.asarray(on_host)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise InvalidArgument(f"class_ids is {ids.dtype} {list(ids.shape)}; integers [C] are needed", field="class_ids")
    num_classes = table.spec.num_classes
    wrong = np.flatnonzero((ids < 0) | (ids >= num_classes))
    if len(wrong):
        place = int(wrong[0])
        raise InvalidArgument(
            f"class_ids[{place}] = {ids[place]} is outside [0, {num_classes})", field="class_ids", index=place
        )
    own = ids.astype(np.int64)  # a copy: the caller's batch may change before the loss
    own.flags.writeable = False
    return LazyRows(table, own)
