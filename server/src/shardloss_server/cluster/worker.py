"""A worker, which hosts shards of any number of tables and answers `ShardGroup`'s verbs; it does not depend on Ray."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from shardloss.allocator import return_freed_memory
from torch import Tensor

from shardloss_server.cluster.group import Order, ShardMissing
from shardloss_server.cluster.stats import WorkerStats, of_process, pools_of
from shardloss_server.machine import Pool
from shardloss_server.numerics.transform import Transform
from shardloss_server.placement import hosted_shards
from shardloss_server.shard import scan
from shardloss_server.shard.kept import KEPT_BYTES, Room
from shardloss_server.shard.record import (
    LabelTarget,
    Mined,
    Part,
    Record,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    TableSpec,
    Upstream,
    allocating,
)
from shardloss_server.shard.scan import PLAIN, AskedLogits
from shardloss_server.shard.table import ShardTable

T = TypeVar("T")


class Worker:
    """The shards of every table that belong to worker `index` of W (`placement.hosted_shards`). Not thread-safe.

    Each verb returns {shard: answer}. Arguments are moved to the worker's device, and answers to the CPU.

    Raises:
        ShardMissing: the worker holds no shard of the table; a restarted worker has lost its rows.
        OutOfMemory: a new table, or the gradient of a step, does not fit; nothing changed.
    """

    def __init__(self, index: int, num_workers: int, device: str = "cpu", kept_bytes: int = KEPT_BYTES) -> None:
        self.index, self.num_workers, self.device = index, num_workers, device
        self._room = Room(kept_bytes)
        self._parts: dict[int, tuple[Part, weakref.ref[Part]]] = {}  # on the device, by id() of the received part
        self._tables: dict[str, dict[int, ShardTable]] = {}

    def create(self, spec: TableSpec, max_sessions: int) -> dict[int, int]:
        """Allocate this worker's shards."""
        shards = hosted_shards(self.index, self.num_workers, spec.placement.num_shards)
        with allocating(f"the shards of {spec.name!r} on worker {self.index}"), self._computing():
            self._tables[spec.name] = {k: ShardTable(spec, k, max_sessions, self._room) for k in shards}
        return dict.fromkeys(shards, 0)

    def fill(self, table: str, piece: int, num_pieces: int) -> dict[int, int]:
        return self._each(table, lambda shard: shard.fill_(piece, num_pieces))

    def memory(self, num_bytes: int) -> dict[int, list[Pool]]:
        """Return the memory that rows are taken from, after giving back what was freed if num_bytes are not left."""
        found = pools_of(self.device)
        if any(pool.free_bytes < num_bytes for pool in found):
            return_freed_memory()
            found = pools_of(self.device)
        return {self.index: found}

    def drop(self, table: str) -> dict[int, int]:
        """Free this worker's shards of a table."""
        for shard in self._tables.pop(table, {}).values():
            shard.kept.clear()
        return {}

    def echo(self, tensor: Tensor) -> dict[int, Tensor]:
        """Return the tensor itself: a call without computation, to measure its cost."""
        return {self.index: tensor}

    def stats(self) -> dict[int, WorkerStats]:
        """Return the stats of this worker's process."""
        num_shards = sum(map(len, self._tables.values()))
        versions = {key: min(s.version for s in shards.values()) for key, shards in self._tables.items() if shards}
        return {self.index: of_process(self.index, self.device, self._room.held_bytes, num_shards, versions)}

    def score(self, table: str, with_gradient: bool, keep: bool, part: Part) -> dict[int, Score]:
        return self._each(table, lambda shard, part: shard.score(part, with_gradient, keep), part)

    def mine(self, table: str, k: int, part: Part) -> dict[int, Mined]:
        return self._each(table, lambda shard, part: shard.mine(part, k), part)

    def begin_labels(self, table: str, name: str) -> dict[int, int]:
        with allocating("the gradient of a label distribution"):
            return self._each(table, lambda shard: shard.begin_labels_(name))

    def add_labels(
        self, table: str, first_class: int, weights: Tensor, g: Tensor | None, part: Part
    ) -> dict[int, LabelTarget]:
        def add(shard: ShardTable, part: Part, weights: Tensor, g: Tensor | None) -> LabelTarget:
            return shard.add_labels_(part, first_class, weights, g)

        return self._each(table, add, part, weights, g)

    def forget_labels(self, table: str) -> dict[int, int]:
        return self._each(table, ShardTable.forget_labels_)

    def gradient(self, table: str, upstream: Upstream, part: Part) -> dict[int, RowGradient]:
        return self._each(table, ShardTable.gradient, part, upstream)

    def apply(self, table: str, order: Order, *parts: Part) -> dict[int, int]:
        def apply(shard: ShardTable, order: Order, *parts: Part) -> int:
            return shard.apply_(order.record(parts))

        return self._each(table, apply, order, *parts)

    def forget_record(self, table: str, version: int) -> dict[int, int]:
        return self._each(table, lambda shard: shard.forget_record(version))

    def write(self, table: str, write: RowWrite) -> dict[int, int]:
        return self._each(table, ShardTable.write_, write)

    def read(self, table: str, class_ids: Tensor, with_state: bool = False) -> dict[int, Rows]:
        return self._each(table, ShardTable.read, class_ids, with_state)

    def scan(self, table: str, question: scan.Question, piece: int, num_pieces: int) -> dict[int, scan.ScanAnswer]:
        return self._each(table, lambda shard, asked: scan.answer(shard, asked, piece, num_pieces), question)

    def asked_logits(
        self, table: str, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN
    ) -> dict[int, AskedLogits]:
        return self._each(table, scan.asked_logits, hidden, class_ids, transform)

    def applied_version(self, table: str) -> dict[int, int]:
        return self._each(table, lambda shard: shard.version)

    def records_since(self, table: str, version: int) -> dict[int, list[Record | RowWrite]]:
        return self._each(table, lambda shard: shard.records_since(version))

    def catch_up(self, table: str, records: Sequence[Record | RowWrite]) -> dict[int, int]:
        """Apply a peer's records in order, skipping those that a shard has already applied."""
        return self._each(table, catch_up, tuple(records))

    def _each(self, table: str, ask: Callable[..., T], *values: object) -> dict[int, T]:
        """Return {shard: ask(shard, *values)} for every shard of a table."""
        if table not in self._tables:
            raise ShardMissing(f"worker {self.index} holds no shard of table {table!r}")
        with self._computing():
            with allocating("the arguments of a call"):
                here = [self._here(value) for value in values]
            answers = {k: ask(shard, *here) for k, shard in self._tables[table].items()}
            return answers if self.device == "cpu" else {k: moved(answer, "cpu") for k, answer in answers.items()}

    def _here(self, value: Any) -> Any:
        """Move a value to the worker's device. A known part returns the same object, so its kept data is found."""
        if self.device == "cpu":
            return value
        if not isinstance(value, Part):
            return moved(value, self.device)
        place = id(value)
        if place not in self._parts:
            forget = weakref.ref(value, lambda _: self._parts.pop(place, None))
            self._parts[place] = moved(value, self.device), forget
        return self._parts[place][0]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Disable autograd, and create new tensors on the worker's device."""
        with torch.inference_mode(), nullcontext() if self.device == "cpu" else torch.device(self.device):
            yield


def moved(value: Any, device: str) -> Any:
    """Return a value with every tensor in it moved to a device; a tensor already there is not copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def catch_up(shard: ShardTable, records: Sequence[Record | RowWrite]) -> int:
    """Apply the records that the shard lacks and return its version."""
    for record in records:
        if record.version > shard.version:
            if isinstance(record, Record):
                shard.apply_(record)
            else:
                shard.write_(record)
    return shard.version
