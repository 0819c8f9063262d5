"""Sampled softmax with element-wise Adagrad against a sparse embedding in torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.side import SideFailed

N, D, V, K = 256, 128, 1_000_000, 2
QUICK_V = 100_000


def shape_of(context: Context, s: int) -> dict[str, Any]:
    """Return N, D, V, S, K and dtype of a row."""
    return {"N": N, "D": D, "V": QUICK_V if context.quick else V, "S": s, "K": K, "dtype": "float32"}


def sampled(context: Context, scenario: str, s: int) -> list[Row]:
    """Compare element-wise Adagrad, then our row-wise Adagrad, with the same rival."""
    shape = shape_of(context, s)
    forms = {"torch sparse Adagrad": "adagrad", "torch sparse Adagrad, ours row-wise": "row_adagrad"}
    rows: list[Row] = []
    try:
        with context.service() as service, context.side("torch_sampled", shape) as rival:
            for name, optimizer in list(forms.items())[: 1 if context.quick else None]:
                with context.ours(service, {**shape, "kind": "sampled", "optimizer": optimizer}) as ours:
                    rows.append(context.row(scenario, name, shape, ours, nullcontext(rival)))
    except SideFailed as error:
        rows.append(missing(scenario, next(iter(forms)), shape, str(error)))
    return rows


def sampled_1k(context: Context) -> list[Row]:
    """Compare at 1,024 candidates."""
    return sampled(context, "sampled-1k", 1024)


def sampled_4k(context: Context) -> list[Row]:
    """Compare at 4,096 candidates."""
    return sampled(context, "sampled-4k", 4096)


def sampled_16k(context: Context) -> list[Row]:
    """Compare at 16,384 candidates."""
    return sampled(context, "sampled-16k", 16384)


def sampled_own(context: Context) -> list[Row]:
    """Compare at 256 uniform candidates per row, drawn by the trainer."""
    shape = shape_of(context, 256)
    with (
        context.service() as service,
        context.ours(service, {**shape, "kind": "own", "optimizer": "adagrad"}) as ours,
    ):
        return [context.row("sampled-own", "torch embedding + bmm", shape, ours, context.side("torch_own", shape))]
