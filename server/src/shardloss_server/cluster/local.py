"""A group of shards in this process, for tests, small tables and machines without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from shardloss_server.cluster.fanout import FanoutGroup, timed
from shardloss_server.cluster.group import Pending, Staged
from shardloss_server.cluster.worker import Worker
from shardloss_server.shard.kept import KEPT_BYTES
from shardloss_server.shard.record import Part


@dataclass(frozen=True, slots=True)
class LocalPending:
    """The pending answer of one worker thread."""

    worker: int
    future: Future[tuple[float, dict[int, Any]]]

    def result(self, timeout_s: float) -> dict[int, Any]:
        return self.future.result(timeout_s)[1]

    @property
    def computed_s(self) -> dict[int, float]:
        return {self.worker: self.future.result(0)[0]}

    def abandon(self) -> None:
        self.future.cancel()


class LocalGroup(FanoutGroup):
    """A group whose workers are in this process, with one thread each, so that a worker's calls keep their order."""

    def __init__(self, num_workers: int = 1, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(num_workers)
        self._workers = [Worker(index, num_workers, kept_bytes=kept_bytes) for index in range(num_workers)]
        self._threads = [ThreadPoolExecutor(1, f"shard-worker-{index}") for index in range(num_workers)]

    @property
    def num_workers(self) -> int:
        """Always 0: there are no worker processes."""
        return 0

    @property
    def devices(self) -> Sequence[str]:
        return [worker.device for worker in self._workers]

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        future = self._threads[worker].submit(timed, getattr(self._workers[worker], method), *args)
        return LocalPending(worker, future)

    def backlog(self) -> int:
        return 0  # abandoned calls that have not begun are cancelled

    def stage(self, part: Part) -> Staged:
        return part

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
