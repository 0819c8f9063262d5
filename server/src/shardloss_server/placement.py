"""Placement: class id <-> (shard, row), and the worker that holds each shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRATEGIES = ("div", "mod")


def num_hosts(num_workers: int, num_shards: int) -> int:
    """Return how many workers hold shards of a table; these are the first ones."""
    return min(num_workers, num_shards)


def hosted_shards(worker: int, num_workers: int, num_shards: int) -> range:
    """Return the neighbouring shards of a table that a worker holds: as many as any other host, give or take one."""
    hosts = num_hosts(num_workers, num_shards)
    if worker >= hosts:
        return range(0)
    return range(worker * num_shards // hosts, (worker + 1) * num_shards // hosts)


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of V classes on K shards.

    "div": contiguous ranges, the first V % K shards one row longer. "mod": shard = id % K, row = id // K.
    Shards may be empty. Source: TensorFlow, embedding_lookup(partition_strategy).
    """

    strategy: str
    num_classes: int
    num_shards: int

    def num_rows(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return self.num_classes // self.num_shards + (shard < self.num_classes % self.num_shards)

    def first_class(self, shard: int) -> int:
        """Return the class id of row 0 of a shard, for "div" and "mod" alike."""
        if self.strategy == "mod":
            return shard
        return shard * (self.num_classes // self.num_shards) + min(shard, self.num_classes % self.num_shards)

    def stride(self) -> int:
        """Return the difference between the class ids of neighbouring rows of a shard."""
        return self.num_shards if self.strategy == "mod" else 1

    def shard_of(self, class_ids: Tensor) -> Tensor:
        """Return the shard that owns each valid class id, in the same shape."""
        if self.strategy == "mod":
            return class_ids % self.num_shards
        short, num_long = divmod(self.num_classes, self.num_shards)
        boundary = num_long * (short + 1)
        in_long = class_ids // (short + 1)
        in_short = num_long + (class_ids - boundary) // max(short, 1)
        return torch.where(class_ids < boundary, in_long, in_short)

    def class_ids(self, shard: int, first_row: int, end_row: int) -> Tensor:
        """Return the class ids of rows [first_row, end_row) of a shard, ascending."""
        start = self.first_class(shard)
        return torch.arange(start + first_row * self.stride(), start + end_row * self.stride(), self.stride())

    def rows(self, shard: int, class_ids: Tensor) -> Tensor:
        """Return the row of each class id inside the shard; meaningless for ids of other shards."""
        return (class_ids - self.first_class(shard)) // self.stride()

    def owned(self, shard: int, class_ids: Tensor) -> Tensor:
        """Return True for each class id [...] that a shard owns; False for padding (negative ids)."""
        first = self.first_class(shard)
        if self.strategy == "mod":
            return (class_ids >= 0) & (class_ids % self.num_shards == shard)
        return (class_ids >= first) & (class_ids < first + self.num_rows(shard)) & (class_ids >= 0)
