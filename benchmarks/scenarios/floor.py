"""The cost of a shard's kernel relative to the three GEMMs."""

from __future__ import annotations

from typing import Any

from benchmarks.context import Context
from benchmarks.interleave import Comparison, Steps
from benchmarks.row import Row, compared, missing
from benchmarks.side import Side, SideFailed

SHAPES = ((256, 50_000), (1024, 50_000), (256, 500_000))  # N and V of one of two shards of the full scenarios
QUICK_SHAPES = ((256, 20_000),)
NAMES = {"float32": "three GEMMs", "bfloat16": "three GEMMs bfloat16"}


def shard_floor(context: Context) -> list[Row]:
    """Compare both dtypes at each shape; the side alternates kernel and GEMMs itself."""
    shapes = QUICK_SHAPES if context.quick else SHAPES
    return [floor(context, n, v, dtype) for dtype in NAMES for n, v in shapes]


def floor(context: Context, n: int, v: int, dtype: str) -> Row:
    """Return one row; V is the shard's number of classes."""
    shape: dict[str, Any] = {"N": n, "D": 128, "V": v, "S": None, "K": 1, "dtype": dtype}
    try:
        with context.side("shard_floor", shape, threads=1) as side:
            found = alternated(side, context.plan.counted)
            note = f"the GEMMs run in chunks of {found.rival.median_of('gemm_chunk'):.0f} rows"
            return compared("shard-floor", NAMES[dtype], shape, found, versions=side.versions, note=note)
    except SideFailed as error:
        return missing("shard-floor", NAMES[dtype], shape, str(error))


def alternated(side: Side, count: int) -> Comparison:
    """Return the steps of the kernel and of the GEMMs, both from the answer of one side."""
    answer = side.step(count)
    return Comparison(Steps(answer.ms), Steps(answer.extra["gemm_ms"], answer.extra))
