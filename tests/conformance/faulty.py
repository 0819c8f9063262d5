"""A group that loses replies: it delegates to another group and applies a change fully, partly or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from shardloss_server.cluster.fanout import FanoutGroup
from shardloss_server.cluster.group import Order, Pending, Staged
from shardloss_server.shard.record import RowWrite, Score

DONE_S = 60.0


class Failed:
    """Work whose reply is lost: `result` raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self, timeout_s: float) -> Any:
        raise self._error


class FaultyGroup:
    """A `ShardGroup` that wraps another one; each call of `lose` makes one more step or row write lose its reply.

    `extent` selects the workers that apply the change nevertheless: "all" of them, the "first", the "last" or "none".
    `before_score`, `before_apply` and `before_repair` are called before that work is sent to the workers.
    """

    def __init__(self, inner: FanoutGroup) -> None:
        self.inner = inner
        self.before_score: Callable[[], object] = lambda: None
        self.before_apply: Callable[[], object] = lambda: None
        self.before_repair: Callable[[], object] = lambda: None
        self._lost: list[tuple[str, Exception]] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def lose(self, extent: str, error: Exception) -> None:
        """Lose the reply of one more change."""
        self._lost.append((extent, error))

    def score(self, table: str, staged: Staged, with_gradient: bool, keep: bool) -> Pending[list[Score]]:
        """Score a part on every shard."""
        self.before_score()
        return self.inner.score(table, staged, with_gradient, keep)

    def apply(self, table: str, order: Order, staged: Sequence[Staged]) -> Pending[list[int]]:
        """Apply one step, or lose its reply."""
        self.before_apply()
        return self._change("apply", table, order, *staged)

    def write(self, table: str, write: RowWrite) -> Pending[list[int]]:
        """Overwrite rows, or lose the reply."""
        return self._change("write", table, write)

    def repair(self, table: str, timeout_s: float) -> int:
        """Bring all shards to one version."""
        self.before_repair()
        return self.inner.repair(table, timeout_s)

    def _change(self, verb: str, table: str, *args: Any) -> Pending[list[int]]:
        with self._lock:
            extent, error = self._lost.pop(0) if self._lost else ("", None)
        if error is None:
            return self.inner.on_all(verb, table, *args)
        num_workers = len(self.inner.devices)
        workers = {"all": range(num_workers), "first": [0], "last": [num_workers - 1], "none": []}[extent]
        for worker in workers:
            self.inner.start(worker, verb, table, *args).result(DONE_S)
        return Failed(error)
