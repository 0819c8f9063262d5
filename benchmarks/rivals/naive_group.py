"""The workers' own code behind plain Ray: `actor.call.remote(...)` and `ray.get`, with parts sent by `ray.put`.

The scenario ray-naive measures how much the service's own path to the workers differs from this.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from shardloss_server.cluster.fanout import FanoutGroup, Gathered
from shardloss_server.cluster.group import Pending, Staged
from shardloss_server.cluster.worker import Worker
from shardloss_server.shard.record import Part
from torch import Tensor

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in ours: only the path of the calls is compared

import ray  # reads the variables above

OBJECT_STORE_BYTES = 512 * 2**20
TIMEOUT_S = 120.0


def register_tensors() -> None:
    """Have Ray transfer tensors as NumPy buffers outside the pickle, which is faster."""
    ray.util.register_serializer(
        Tensor, serializer=lambda tensor: tensor.numpy(), deserializer=lambda array: torch.from_numpy(array.copy())
    )


class Actor:
    """A `Worker` with one thread."""

    def __init__(self, index: int, num_workers: int) -> None:
        register_tensors()
        torch.set_num_threads(1)
        self._worker = Worker(index, num_workers)

    def call(self, method: str, *args: Any) -> Any:
        """Call one verb of `Worker` and return its answer."""
        return getattr(self._worker, method)(*args)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one actor call."""

    ref: Any
    computed_s: Mapping[int, float] = field(default_factory=dict)  # not measured

    def result(self, timeout_s: float) -> Any:
        return ray.get(self.ref, timeout=timeout_s)

    def abandon(self) -> None:
        """Do nothing, because Ray cannot withdraw a call."""


class NaiveGroup(FanoutGroup):
    """A group of W actors on an embedded Ray."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        ray.init(
            address="local",
            num_cpus=max(num_workers, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        register_tensors()
        actor = ray.remote(num_cpus=1)(Actor)
        self._actors: list[Any] = [actor.remote(index, num_workers) for index in range(num_workers)]
        self.echo(torch.zeros(1))

    @property
    def num_workers(self) -> int:
        return self._num_workers

    @property
    def devices(self) -> Sequence[str]:
        return ["cpu"] * self._num_workers

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        return Answer(self._actors[worker].call.remote(method, *args))

    def backlog(self) -> int:
        return 0  # calls are abandoned only if something fails

    def stage(self, part: Part) -> Staged:
        staged: Staged = ray.put(part)
        return staged

    def echo(self, tensor: Tensor) -> Gathered[Tensor]:
        """Send a tensor to every worker and gather every worker's copy."""
        placed = ray.put(tensor)  # once for all workers: at least as fast as an argument of each call
        return Gathered([Answer(self._actors[w].call.remote("echo", placed)) for w in range(self._num_workers)])

    def close(self) -> None:
        ray.shutdown()
