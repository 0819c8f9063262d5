"""The rival `ours`, which also reports the time of each RPC as the trainer sees it: loss_rpc_ms and commit_rpc_ms.

The shape is that of `ours` with overlap false, so that a step is one loss and one commit, in that order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from shardloss.channel import Channel

from benchmarks.rivals.ours import Ours
from benchmarks.rivals.protocol import serve


class TimedOurs:
    """A trainer whose channel records the times of its calls."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.calls_ms: list[float] = []
        self._time_calls()
        self.ours = Ours(shape)

    def _time_calls(self) -> None:
        call = Channel.unary

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.calls_ms.append(1e3 * (time.perf_counter() - start))

        Channel.unary = timed  # type: ignore[method-assign]

    def versions(self) -> Mapping[str, str]:
        return self.ours.versions()

    def step(self) -> Mapping[str, float]:
        """Run one step, which is one loss and one commit, and return its times."""
        self.calls_ms.clear()
        found = self.ours.step()
        loss, commit = self.calls_ms
        return {**found, "loss_rpc_ms": loss, "commit_rpc_ms": commit}

    def close(self) -> None:
        """Delete the table."""
        self.ours.close()


def main() -> None:
    """Serve requests, then delete the table."""
    made: list[TimedOurs] = []

    def make(shape: dict[str, Any]) -> TimedOurs:
        made.append(TimedOurs(shape))
        return made[0]

    try:
        serve(make)
    finally:
        for timed in made:
            timed.close()


if __name__ == "__main__":
    main()
