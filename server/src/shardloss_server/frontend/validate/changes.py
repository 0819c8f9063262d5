"""Checks of commits, row writes and class counts that do not depend on the state of the table."""

from __future__ import annotations

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend.request import CommitRequest
from shardloss_server.frontend.validate.tensors import (
    FLOATS,
    at_least,
    finite,
    finite_number,
    first_index,
    hidden,
    id_list,
    name_of,
    rate,
    refuse_where,
    session,
    show,
    vector,
)
from shardloss_server.numerics.optimizer import SUMS_OF_SQUARES, State, state_widths
from shardloss_server.shard.record import TableSpec

MAX_COMMITS = 1 << 62  # steps stay within 64 bits, however many commits follow


def commit_request(request: CommitRequest, spec: TableSpec, limits: Limits) -> None:
    """Check a commit without its tickets, which are looked up later."""
    session(request.session)
    at_least(request.step, 1, "step")
    if not request.parts:
        raise InvalidArgument("parts is empty; a commit needs at least one ticket", field="parts")
    if len(request.parts) > limits.max_parts:
        raise LimitExceeded(f"{len(request.parts)} parts exceed max_parts = {limits.max_parts}", field="parts")
    seen: set[str] = set()
    for place, part in enumerate(request.parts):
        if part.ticket in seen:
            raise InvalidArgument(
                f"parts[{place}].ticket repeats the ticket of an earlier part", field="parts", index=place
            )
        seen.add(part.ticket)
        if part.g is not None:
            vector(f"parts[{place}].g", part.g, None, spec)
    rate(request.learning_rate, "learning_rate", spec)
    finite_number(request.grad_scale, "grad_scale")
    if request.max_staleness is not None:
        at_least(request.max_staleness, 0, "max_staleness")


def row_write(ids: Tensor, rows: Tensor, biases: Tensor | None, spec: TableSpec, limits: Limits) -> None:
    """Check rows to overwrite: class_ids [M] distinct, rows [M, D], biases [M] only if the table has them."""
    id_list(ids, spec.num_classes)
    order = torch.argsort(ids, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[order[1:]] = ids[order][1:] == ids[order][:-1]
    if repeated.any():
        index = first_index(repeated)
        place, class_id = show(index), int(ids[index[0]])
        raise InvalidArgument(f"class_ids[{place}] = {class_id} occurs twice", field="class_ids", index=place)
    hidden(rows, spec, limits, field="rows")
    refuse_where(~torch.isfinite(rows.to(getattr(torch, spec.dtype))), rows, "rows", f"overflows {spec.dtype}")
    if len(rows) != len(ids):
        raise InvalidArgument(f"rows has {len(rows)} rows for {len(ids)} class_ids", field="rows")
    if biases is None:
        return
    if not spec.bias:
        raise InvalidArgument("this table has no biases", field="biases")
    vector("biases", biases, len(ids), spec)


def row_state(of_rows: State, of_biases: State, num_rows: int, spec: TableSpec) -> None:
    """Check optimizer state to overwrite: [M, W] under the optimizer's names, finite, sums of squares not negative."""
    if of_biases and not spec.bias:
        raise InvalidArgument("this table has no biases", field="bias_state")
    for field, given, dim in (("weight_state", of_rows, spec.dim), ("bias_state", of_biases, 1)):
        widths = state_widths(spec.optimizer, dim)
        for place, (name, values) in enumerate(given.items()):
            if name not in widths:
                known = ", ".join(widths) or "no state"
                raise InvalidArgument(
                    f"{field}[{place}].name = {name[:40]!r} is unknown: {spec.optimizer.kind} has {known}",
                    field=field,
                    index=place,
                )
            where = f"{field}[{place}].values"
            if values.dtype not in FLOATS or tuple(values.shape) != (num_rows, widths[name]):
                found = f"{name_of(values)} {list(values.shape)}"
                raise InvalidArgument(
                    f"{where} is {found}; floats [{num_rows}, {widths[name]}] are needed", field=where
                )
            finite(values, where, spec)
            if name in SUMS_OF_SQUARES:
                refuse_where(values < 0, values, where, "is negative")


def num_commits(value: int | None) -> None:
    """Check the optimizer step to continue from: None, or in [0, 2^62]."""
    if value is not None and not 0 <= value <= MAX_COMMITS:
        raise InvalidArgument(f"num_commits = {value} is outside [0, 2^62]", field="num_commits")


def class_range(first_class: int, num_classes: int, spec: TableSpec) -> None:
    """Check that a range of classes is within the table."""
    at_least(first_class, 0, "first_class")
    at_least(num_classes, 0, "num_classes")
    if first_class + num_classes > spec.num_classes:
        raise InvalidArgument(
            f"first_class = {first_class} plus {num_classes} classes exceeds the table's {spec.num_classes} classes",
            field="first_class",
        )


def learned_counts(first_class: int, learned: Tensor, spec: TableSpec) -> None:
    """Check learned counts: [M] int64 of a range of classes; their values are checked when they are stored."""
    if learned.dim() != 1:
        raise InvalidArgument(f"learned has shape {list(learned.shape)}; [M] is needed", field="learned")
    class_range(first_class, len(learned), spec)


def class_counts(first_class: int, counts: Tensor, spec: TableSpec, limits: Limits) -> None:
    """Check counts [M] of a range of classes: finite, not negative, within the table and max_table_bytes."""
    at_least(first_class, 0, "first_class")
    vector("counts", counts, None)
    refuse_where(counts < 0, counts, "counts", "is negative")
    class_range(first_class, len(counts), spec)
    if 40 * spec.num_classes > limits.max_table_bytes:
        raise LimitExceeded(f"counts of {spec.num_classes} classes do not fit max_table_bytes", field="counts")
