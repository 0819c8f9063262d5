"""The rows of one shard, as stored and as a loss uses them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardloss_server.numerics import kernel
from shardloss_server.numerics.exponentials import multiplies_bfloat16
from shardloss_server.numerics.transform import Transform, normalized
from shardloss_server.shard.record import TableSpec

BLOCK_ROWS = 1 << 14  # rows that are read or changed at once, so that temporaries stay small
MANY_ROWS = 256  # embedding_bag has a fixed cost of 0.01 ms

Index = Tensor | slice  # rows of a shard: sparse, or one contiguous range


class ShardRows:
    """One shard of a table, not filled yet: weights [R, D] in storage dtype and biases [R] in compute dtype."""

    def __init__(self, spec: TableSpec, shard: int) -> None:
        self.spec, self.shard = spec, shard
        self.num_rows = spec.placement.num_rows(shard)
        self.compute_dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self.weights = torch.empty(self.num_rows, spec.dim, dtype=getattr(torch, spec.dtype))
        self.biases = torch.empty(self.num_rows, dtype=self.compute_dtype)
        is_plain = self.weights.dtype == torch.bfloat16 and not spec.bias
        self.multiplies_bfloat16 = is_plain and multiplies_bfloat16(self.weights.device)

    def gather(self, row_index: Index, transform: Transform) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return transformed rows, their biases, and their norms if the transform normalises, all in compute dtype."""
        rows, biases = taken(self.weights, row_index).to(self.compute_dtype), taken(self.biases, row_index)
        if transform.scale != 1.0:
            biases = biases * transform.scale
        if not transform.normalize:
            return rows, biases, None
        units, norms = normalized(rows)
        return units, biases, norms

    def dense_rows(self, first_row: int, end_row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return class ids [R], rows [R, D] and biases [R] of a range of rows, in compute dtype."""
        class_ids = self.spec.placement.class_ids(self.shard, first_row, end_row)
        rows = self.weights[first_row:end_row].to(self.compute_dtype)
        return class_ids, rows, self.biases[first_row:end_row]

    def class_ids(self, row_index: Index) -> Tensor:
        """Return the class id of each row."""
        if isinstance(row_index, slice):
            return self.spec.placement.class_ids(self.shard, row_index.start, row_index.stop)
        placement = self.spec.placement
        return placement.first_class(self.shard) + row_index * placement.stride()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of at most BLOCK_ROWS rows."""
        for start in range(0, self.num_rows, BLOCK_ROWS):
            yield start, min(start + BLOCK_ROWS, self.num_rows)

    @staticmethod
    def chunk_rows(num_rows: int) -> int:
        """Return the number of rows in a chunk for num_rows rows of hidden."""
        return max(64, kernel.CHUNK_LOGITS // max(1, num_rows) // 64 * 64)

    def chunks(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows whose logits against num_rows of hidden stay within kernel.CHUNK_LOGITS."""
        size = self.chunk_rows(num_rows)
        for start in range(0, self.num_rows, size):
            yield start, min(start + size, self.num_rows)


def taken(values: Tensor, index: Index) -> Tensor:
    """Return values[index]: a copy of sparse rows, a view of a range.

    index_select is seven times as fast as values[index] if the rows are far apart. embedding_bag with one row per bag
    is another 1.7 times as fast, because it prefetches the next rows.
    """
    if isinstance(index, slice):
        return values[index]
    if values.dtype != torch.float32 or values.dim() != 2 or len(index) < MANY_ROWS:
        return torch.index_select(values, 0, index)
    return torch.nn.functional.embedding_bag(index, values, torch.arange(len(index)), mode="sum")


def put_(values: Tensor, index: Index, new: Tensor) -> None:
    """Assign values[index] = new; do nothing if new is a view of that range.

    index_copy_ copies number by number, so rows that divide into 16-byte numbers are copied as such numbers.
    """
    if isinstance(index, Tensor):
        if is_of_words(values) and is_of_words(new):
            values, new = values.view(torch.complex128), new.view(torch.complex128)
        values.index_copy_(0, index, new)
    elif new.data_ptr() != values[index].data_ptr():
        values[index] = new


def is_of_words(rows: Tensor) -> bool:
    """Return True if rows [M, D] are contiguous and each row divides into aligned 16-byte numbers."""
    if rows.dim() != 2 or not rows.is_contiguous():
        return False
    return all(count * rows.element_size() % 16 == 0 for count in (rows.shape[1], rows.storage_offset()))
