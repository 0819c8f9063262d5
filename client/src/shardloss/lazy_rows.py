"""A lookup of table rows that is never fetched, which losses accept in place of the output of an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument
from shardloss.wire import Array

if TYPE_CHECKING:
    from torch import Tensor

    from shardloss.table import Table


@dataclass(frozen=True, slots=True, eq=False)
class LazyRows:
    """The rows [C, D] of class_ids [C] of a table, repeats allowed, with their values at the time a loss scores them.

    `Table.embeddings` creates the lookup without fetching rows; `Table.read_rows` reads their values.
    """

    table: Table
    class_ids: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (C, D) of the rows."""
        return len(self.class_ids), self.table.spec.dim

    def __len__(self) -> int:
        return len(self.class_ids)


def lazy_rows(table: Table, class_ids: Array | Tensor) -> LazyRows:
    """Return a lookup of class_ids [C], a NumPy array or a tensor on any device.

    Raises:
        InvalidArgument: class_ids is not a one-dimensional array of class ids of the table.
    """
    if isinstance(class_ids, np.ndarray) or not hasattr(class_ids, "cpu"):
        ids = np.asarray(class_ids)
    else:
        from shardloss.autograd import to_numpy

        ids = to_numpy(class_ids)
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
