"""The verbs of the `ShardGroup` port, all built on one primitive: start a method on a worker."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from torch import Tensor

from shardloss_server.cluster.group import Order, Pending, ShardMissing, Staged, WorkerLost
from shardloss_server.cluster.stats import SeenWorker, WorkerStats
from shardloss_server.machine import Pool
from shardloss_server.numerics.transform import Transform
from shardloss_server.placement import num_hosts
from shardloss_server.shard.record import (
    LabelTarget,
    Mined,
    Part,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    TableSpec,
    Upstream,
)
from shardloss_server.shard.scan import PLAIN, AskedLogits, Question, ScanAnswer

T = TypeVar("T")


class Gathered(Generic[T]):
    """The answers {shard: answer} of all workers, combined into one list in shard order, within one deadline."""

    def __init__(self, pending: Sequence[Pending[dict[int, T]]]) -> None:
        self._pending = pending

    def abandon(self) -> None:
        """Cancel the calls that no worker has begun."""
        for answer in self._pending:
            answer.abandon()

    def result(self, timeout_s: float) -> list[T]:
        deadline = time.monotonic() + timeout_s
        by_shard: dict[int, T] = {}
        for answer in self._pending:
            by_shard.update(answer.result(max(0.0, deadline - time.monotonic())))
        return [by_shard[k] for k in sorted(by_shard)]

    @property
    def computed_s(self) -> dict[int, float]:
        return {worker: seconds for answer in self._pending for worker, seconds in answer.computed_s.items()}


class FanoutGroup(ABC):
    """A `ShardGroup` without its workers: a subclass starts methods on workers and stages parts."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._num_shards: dict[str, int] = {}  # by table; calls on an unknown table go to every worker
        self._pid_of: dict[int, int] = {}  # by worker, as last reported
        self._num_restarts: Counter[int] = Counter()

    @abstractmethod
    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        """Start a `Worker` method on one worker; a staged part among args arrives as the part itself."""

    def start_on(
        self,
        workers: Sequence[int],
        method: str,
        *args: Any,
        merge_over: int | None = None,  # noqa: ARG002  (for groups with relays)
    ) -> Sequence[Pending[dict[int, Any]]]:
        """Start a method on some workers; with merge_over = K, relays may merge the scores of a table of K shards."""
        return [self.start(worker, method, *args) for worker in workers]

    @abstractmethod
    def stage(self, part: Part) -> Staged:
        """Place a part where the workers can read it in later verbs."""

    def failure(self) -> str | None:
        """Return None: workers in this process cannot fail alone."""
        return None

    @abstractmethod
    def backlog(self) -> int:
        """Return the number of abandoned calls that have not finished."""

    def on_all(self, method: str, table: str, *args: Any) -> Gathered[Any]:
        """Start a method on every worker that holds a shard of a table."""
        return Gathered(self.start_on(self._hosts(table), method, table, *args))

    def _hosts(self, table: str) -> range:
        return range(num_hosts(self._num_workers, self._num_shards.get(table, self._num_workers)))

    def create(self, spec: TableSpec, max_sessions: int) -> Gathered[int]:
        self._num_shards[spec.name] = spec.placement.num_shards
        return Gathered(self.start_on(self._hosts(spec.name), "create", spec, max_sessions))

    def fill(self, table: str, piece: int, num_pieces: int) -> Gathered[int]:
        return self.on_all("fill", table, piece, num_pieces)

    def memory(self, num_shards: int, num_bytes: int) -> Gathered[Sequence[Pool]]:
        return Gathered(self.start_on(range(num_hosts(self._num_workers, num_shards)), "memory", num_bytes))

    def drop(self, table: str) -> Gathered[int]:
        pending = self.on_all("drop", table)
        self._num_shards.pop(table, None)
        return pending

    def echo(self, tensor: Tensor) -> Gathered[Tensor]:
        """Send a tensor to every worker and back: a fan-out without computation, to measure its cost."""
        return Gathered(self.start_on(range(self._num_workers), "echo", tensor))

    def stats(self, timeout_s: float) -> list[SeenWorker]:
        left = remaining_until(time.monotonic() + timeout_s)
        pending = [self.start(worker, "stats") for worker in range(self._num_workers)]
        return [self._seen(worker, one, left()) for worker, one in enumerate(pending)]

    def _seen(self, worker: int, pending: Pending[dict[int, Any]], timeout_s: float) -> SeenWorker:
        stats: WorkerStats | None = None
        with suppress(TimeoutError, WorkerLost, ShardMissing):  # missing: the worker is known to have died
            stats = answered(pending, timeout_s)[worker]
        if stats is not None:
            if self._pid_of.setdefault(worker, stats.pid) != stats.pid:
                self._num_restarts[worker] += 1
            self._pid_of[worker] = stats.pid
        return SeenWorker(worker, self.devices[worker], self._num_restarts[worker], stats)

    @property
    @abstractmethod
    def devices(self) -> Sequence[str]:
        """The torch device of each worker, by worker index."""

    def score(self, table: str, staged: Staged, with_gradient: bool, keep: bool) -> Gathered[Score]:
        over = self._num_shards.get(table)
        return Gathered(self.start_on(self._hosts(table), "score", table, with_gradient, keep, staged, merge_over=over))

    def mine(self, table: str, staged: Staged, k: int) -> Gathered[Mined]:
        return self.on_all("mine", table, k, staged)

    def begin_labels(self, table: str, name: str) -> Gathered[int]:
        return self.on_all("begin_labels", table, name)

    def add_labels(
        self, table: str, staged: Staged, first_class: int, weights: Tensor, g: Tensor | None
    ) -> Gathered[LabelTarget]:
        return self.on_all("add_labels", table, first_class, weights, g, staged)

    def forget_labels(self, table: str) -> Gathered[int]:
        return self.on_all("forget_labels", table)

    def gradient(self, table: str, staged: Staged, upstream: Upstream) -> Gathered[RowGradient]:
        return self.on_all("gradient", table, upstream, staged)

    def apply(self, table: str, order: Order, staged: Sequence[Staged]) -> Gathered[int]:
        return self.on_all("apply", table, order, *staged)

    def forget_record(self, table: str, version: int) -> Gathered[int]:
        return self.on_all("forget_record", table, version)

    def write(self, table: str, write: RowWrite) -> Gathered[int]:
        return self.on_all("write", table, write)

    def read(self, table: str, class_ids: Tensor, with_state: bool = False) -> Gathered[Rows]:
        return self.on_all("read", table, class_ids, with_state)

    def scan(self, table: str, question: Question, piece: int, num_pieces: int) -> Gathered[ScanAnswer]:
        return self.on_all("scan", table, question, piece, num_pieces)

    def asked_logits(
        self, table: str, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN
    ) -> Gathered[AskedLogits]:
        return self.on_all("asked_logits", table, hidden, class_ids, transform)

    def applied_versions(self, table: str) -> Gathered[int]:
        return self.on_all("applied_version", table)

    def repair(self, table: str, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        left = remaining_until(deadline)
        per_worker = [answered(self.start(w, "applied_version", table), left()) for w in self._hosts(table)]
        versions = {shard: version for answer in per_worker for shard, version in answer.items()}
        if not versions:
            return 0
        highest: int = max(versions.values())
        lowest: int = min(versions.values())
        if lowest < highest:
            holder = next(w for w, answer in enumerate(per_worker) if highest in answer.values())
            records = answered(self.start(holder, "records_since", table, lowest), left())
            complete = max(records.values(), key=len)
            self.on_all("catch_up", table, complete).result(left())
        return highest


def timed(call: Callable[..., T], *args: Any) -> tuple[float, T]:
    """Run a call; return the seconds it took and its answer."""
    began = time.perf_counter()
    answer = call(*args)
    return time.perf_counter() - began, answer


def answered(pending: Pending[T], timeout_s: float) -> T:
    """Wait for the answer of a call that changes nothing; abandon the call if it times out."""
    try:
        return pending.result(timeout_s)
    except TimeoutError:
        pending.abandon()
        raise


def remaining_until(deadline: float) -> Callable[[], float]:
    """Return a function that returns the seconds left until a monotonic time, never negative."""
    return lambda: max(0.0, deadline - time.monotonic())
