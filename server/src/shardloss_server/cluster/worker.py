"""A worker: hosts shards of any number of tables and answers the port's verbs. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from shardloss_server.cluster.group import Order, ShardMissing
from shardloss_server.shard import scan
from shardloss_server.shard.record import (
    Part,
    Record,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    TableSpec,
    Upstream,
)
from shardloss_server.shard.scan import AskedLogits
from shardloss_server.shard.table import ShardTable

T = TypeVar("T")


class Worker:
    """Shards index, index + W, index + 2 W, ... of every table. One thread at a time.

    Each verb returns {shard: answer}.

    Raises:
        ShardMissing: the table is not here; a worker that was restarted has lost what it held.
    """

    def __init__(self, index: int, num_workers: int, device: str = "cpu") -> None:
        self.index, self.num_workers, self.device = index, num_workers, device
        self._tables: dict[str, dict[int, ShardTable]] = {}

    def create(self, spec: TableSpec, max_sessions: int) -> dict[int, int]:
        """Allocate and fill this worker's shards."""
        shards = range(self.index, spec.placement.num_shards, self.num_workers)
        with torch.inference_mode():
            self._tables[spec.name] = {k: ShardTable(spec, k, max_sessions, self.device) for k in shards}
        return dict.fromkeys(shards, 0)

    def drop(self, table: str) -> dict[int, int]:
        """Free this worker's shards of a table."""
        self._tables.pop(table, None)
        return {}

    def score(self, table: str, with_gradient: bool, part: Part) -> dict[int, Score]:
        return self._each(table, lambda shard: shard.score(part, with_gradient))

    def gradient(self, table: str, upstream: Upstream, part: Part) -> dict[int, RowGradient]:
        return self._each(table, lambda shard: shard.gradient(part, upstream))

    def apply(self, table: str, order: Order, *parts: Part) -> dict[int, int]:
        record = order.record(parts)
        return self._each(table, lambda shard: shard.apply_(record))

    def write(self, table: str, write: RowWrite) -> dict[int, int]:
        return self._each(table, lambda shard: shard.write_(write))

    def read(self, table: str, class_ids: Tensor) -> dict[int, Rows]:
        return self._each(table, lambda shard: shard.read(class_ids))

    def scan(self, table: str, question: scan.Question, piece: int, num_pieces: int) -> dict[int, scan.ScanAnswer]:
        return self._each(table, lambda shard: scan.answer(shard, question, piece, num_pieces))

    def asked_logits(self, table: str, hidden: Tensor, class_ids: Tensor) -> dict[int, AskedLogits]:
        return self._each(table, lambda shard: scan.asked_logits(shard, hidden, class_ids))

    def applied_version(self, table: str) -> dict[int, int]:
        return self._each(table, lambda shard: shard.version)

    def records_since(self, table: str, version: int) -> dict[int, list[Record | RowWrite]]:
        return self._each(table, lambda shard: shard.records_since(version))

    def catch_up(self, table: str, records: Sequence[Record | RowWrite]) -> dict[int, int]:
        """Apply records of a peer, in order; those that a shard has already are no-ops."""
        return self._each(table, lambda shard: catch_up(shard, records))

    def _each(self, table: str, ask: Callable[[ShardTable], T]) -> dict[int, T]:
        if table not in self._tables:
            raise ShardMissing(f"worker {self.index} holds no shard of table {table!r}")
        with torch.inference_mode():
            return {k: ask(shard) for k, shard in self._tables[table].items()}


def catch_up(shard: ShardTable, records: Sequence[Record | RowWrite]) -> int:
    """Apply what the shard lacks and return its version."""
    for record in records:
        if record.version > shard.version:
            if isinstance(record, Record):
                shard.apply_(record)
            else:
                shard.write_(record)
    return shard.version
