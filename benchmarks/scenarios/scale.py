"""The cost of more classes in a sampled step, and of more shards in an exact step."""

from __future__ import annotations

from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.scenarios import full
from benchmarks.scenarios import sampled as sampled_scenarios
from benchmarks.server import running
from benchmarks.side import SideFailed


def scale_v(context: Context) -> list[Row]:
    """Compare sampled-4k over more and more classes with itself over 100k classes."""
    base, *larger = (20_000, 200_000) if context.quick else (100_000, 1_000_000, 10_000_000)
    rows = []
    for v in larger:
        shape = {**sampled_scenarios.shape_of(context, 4096), "V": v}
        name = f"itself at V={short(base)} (V={short(v)})"
        ours = {**shape, "kind": "sampled", "optimizer": "adagrad"}
        with context.service() as service, context.ours(service, ours) as many:
            rows.append(context.row("scale-V", name, shape, many, context.ours(service, {**ours, "V": base})))
    return rows


def scale_k(context: Context) -> list[Row]:
    """Compare full-1M on K workers of one thread with one worker of two threads, all on the two cores of the run.

    Both services run at the same time and are measured in turns. The overhead per shard is the extra time divided by K.
    """
    rows = []
    for k in (4,) if context.quick else (2, 4, 8):
        shape = {**full.shape_of(context, 256, 1_000_000), "K": k}
        name = f"itself at K=1 (K={k})"
        try:
            rows.append(against_one_worker(context, name, shape))
        except SideFailed as error:
            rows.append(missing("scale-K", name, shape, str(error)))
    return rows


def against_one_worker(context: Context, name: str, shape: dict[str, Any]) -> Row:
    """Return one row, with the overhead per shard in its note."""
    k, ours = shape["K"], full.ours_of(shape)
    with (
        context.service(workers=1, worker_threads=2) as one,
        running(k) as many,
        context.ours(many, ours) as cut,
    ):
        row = context.row("scale-K", name, shape, cut, context.ours(one, {**ours, "K": 1}))
    if row.ours_ms is None or row.rival_ms is None:
        return row
    overhead = (row.ours_ms - row.rival_ms) / k
    return row.but(note=f"{row.note} {overhead:+.2f} ms per shard".strip())


def short(count: int) -> str:
    """Format a count as 100k, 1M or 10M."""
    return f"{count // 1_000_000}M" if count >= 1_000_000 else f"{count // 1000}k"
