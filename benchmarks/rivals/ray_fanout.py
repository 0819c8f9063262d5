"""A tensor sent to both workers and returned by each: group "service" is the service's own, "naive" is plain Ray.

The shape: group; bytes of the tensor.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from shardloss_server.cluster.fanout import Gathered
from torch import Tensor

from benchmarks.rivals.protocol import Rival, serve

NUM_WORKERS = 2
TIMEOUT_S = 60.0


class Group(Protocol):
    """The interface that both groups have."""

    def echo(self, tensor: Tensor) -> Gathered[Tensor]: ...

    def close(self) -> None: ...


class Fanout:
    """A rival whose step is one round of the fan-out."""

    def __init__(self, group: Group, num_bytes: int) -> None:
        self.group, self.tensor = group, torch.randn(num_bytes // 4)

    def versions(self) -> Mapping[str, str]:
        return {"ray": importlib.metadata.version("ray")}

    def step(self) -> None:
        answers = self.group.echo(self.tensor).result(TIMEOUT_S)
        assert [len(answer) for answer in answers] == NUM_WORKERS * [len(self.tensor)]


def make_group(name: str) -> Group:
    """Return the named group, which starts its own Ray."""
    if name == "naive":
        from benchmarks.rivals.naive_group import NaiveGroup

        return NaiveGroup(NUM_WORKERS)
    from shardloss_server.cluster.ray_group import RayGroup

    return RayGroup(NUM_WORKERS)


def main() -> None:
    """Serve requests, then end the workers."""
    groups: list[Group] = []

    def make(shape: dict[str, Any]) -> Rival:
        groups.append(make_group(shape["group"]))
        return Fanout(groups[0], shape["bytes"])

    try:
        serve(make)
    finally:
        for group in groups:
            group.close()


if __name__ == "__main__":
    main()
