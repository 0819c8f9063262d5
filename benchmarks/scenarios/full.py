"""The exact softmax with SGD against torch's local losses."""

from __future__ import annotations

from contextlib import nullcontext
from statistics import median
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, compared
from benchmarks.server import Service
from benchmarks.side import Side, SideFailed

QUICK_DIVISOR, QUICK_MOST = 5, 40_000
D, K = 128, 2


def shape_of(context: Context, n: int, v: int, dtype: str = "float32") -> dict[str, Any]:
    """Return N, D, V, S, K and dtype of a row; quick mode has fewer classes."""
    num_classes = min(v // QUICK_DIVISOR, QUICK_MOST) if context.quick else v
    return {"N": n, "D": D, "V": num_classes, "S": None, "K": K, "dtype": dtype}


def ours_of(shape: dict[str, Any]) -> dict[str, Any]:
    """Return our trainer's shape for the shape of a row."""
    return {**shape, "kind": "full", "optimizer": "sgd"}


def full_100k(context: Context) -> list[Row]:
    """Compare with eager torch, including the latency that the trainer sees, and with torch.compile."""
    return local(context, "full-100k", shape_of(context, 256, 100_000), want_visible=True)


def full_100k_wide(context: Context) -> list[Row]:
    """Compare at four times the rows of hidden."""
    shape = shape_of(context, 1024, 100_000)
    return local(context, "full-100k-wide", shape, want_visible=False)


def full_lce(context: Context) -> list[Row]:
    """Compare with torch's linear_cross_entropy: chunked, with its default options, and without options."""
    shape = shape_of(context, 256, 20_000 if context.quick else 100_000)  # a slow rival
    names = {"F.linear_cross_entropy, default options": "lce_chunked", "F.linear_cross_entropy, no options": "lce"}
    with context.service() as service, context.ours(service, ours_of(shape)) as ours:
        return [
            context.row("full-lce", name, shape, ours, context.side("torch_full", {**shape, "form": form}))
            for name, form in list(names.items())[: 1 if context.quick else None]
        ]


def full_1m(context: Context) -> list[Row]:
    """Compare at ten times the classes, in both dtypes; a quick run has only bfloat16."""
    rows = []
    dtypes = {"float32": "eager torch", "bfloat16": "eager torch bfloat16"}
    for dtype, name in list(dtypes.items())[1 if context.quick else 0 :]:
        shape = shape_of(context, 256, 1_000_000, dtype)
        with context.service() as service, context.ours(service, ours_of(shape)) as ours:
            rows.append(
                context.row("full-1M", name, shape, ours, context.side("torch_full", {**shape, "form": "eager"}))
            )
    return rows


def local(context: Context, scenario: str, shape: dict[str, Any], *, want_visible: bool) -> list[Row]:
    """Compare with eager torch and with torch.compile; if there is no C++ compiler, that row has the reason."""
    with context.service() as service, context.ours(service, ours_of(shape)) as ours:
        rows = []
        with context.side("torch_full", {**shape, "form": "eager"}) as eager:
            row = context.row(scenario, "eager torch", shape, ours, nullcontext(eager))
            rows.append(with_visible(context, row, shape, service, eager) if want_visible else row)
        if not context.quick:  # compiling would take most of a quick run's time
            rival = context.side("torch_full", {**shape, "form": "compile"})
            rows.append(context.row(scenario, "torch.compile", shape, ours, rival))
    return rows


def with_visible(context: Context, row: Row, shape: dict[str, Any], service: Service, eager: Side) -> Row:
    """Return the row with the latency that a trainer sees if commits overlap, or with a note if measuring it failed."""
    overlapped = {**ours_of(shape), "overlap": True, "settle": True}
    try:
        with context.ours(service, overlapped) as ours:
            found = context.compare(ours, eager)
    except SideFailed as error:
        return row.but(note=f"{row.note} no visible latency: {error}".strip())
    visible = compared(row.scenario, row.rival, shape, found)
    assert visible.visible_ms is not None
    return row.but(visible_ms=visible.visible_ms, visible_ratio=visible.visible_ms / median(found.rival.ms))
