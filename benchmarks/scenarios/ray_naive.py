"""The same shards behind plain Ray: the bare fan-out, and a whole step behind the same front end."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.scenarios.against import KEEP_FREED_MEMORY, against
from benchmarks.scenarios.foreign import ADAGRAD, shape_of
from benchmarks.side import SideFailed

FANOUT_BYTES = {"0.13 MB": 1 << 17, "1 MB": 1 << 20}
ECHO = "sent to both workers, and the same size returned by each"


def ray_naive(context: Context) -> list[Row]:
    """Compare fan-outs of two sizes, and one step."""
    sizes = list(FANOUT_BYTES.items())[1 if context.quick else 0 :]
    rows = [fanout(context, size, num_bytes) for size, num_bytes in sizes]
    shape = shape_of(256, 128, 100_000 if context.quick else 1_000_000, 1024)
    start = partial(context.side, "ours_naive", {**shape, **ADAGRAD}, threads=1, variables=KEEP_FREED_MEMORY)
    return [*rows, against(context, "ray-naive", "step of sampled-1k", shape, ADAGRAD, start)]


def fanout(context: Context, size: str, num_bytes: int) -> Row:
    """Compare an echo of the service's group with one of a plain group, each with its own Ray."""
    shape: dict[str, Any] = {"bytes": num_bytes, "K": 2, "dtype": "float32"}
    rival = f"fan-out of {size}"
    sides = [
        context.side("ray_fanout", {**shape, "group": group}, threads=1, variables=KEEP_FREED_MEMORY)
        for group in ("service", "naive")
    ]
    try:
        with sides[0] as ours, sides[1] as naive:
            return context.row("ray-naive", rival, shape, ours.ready(), naive, note=ECHO)
    except SideFailed as error:
        return missing("ray-naive", rival, shape, str(error))
