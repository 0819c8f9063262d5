"""Checks of a ComputeLoss against its table and the limits."""

from __future__ import annotations

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend.request import LabelColumns, LossRequest
from shardloss_server.frontend.validate.candidates import candidates, num_drawn
from shardloss_server.frontend.validate.objective import objective
from shardloss_server.frontend.validate.tensors import (
    FLOATS,
    answered_bytes,
    at_least,
    class_ids,
    finite,
    finite_number,
    hidden,
    name_of,
    rate,
    refuse_if,
    refuse_where,
    session,
    vector,
    width_of,
)
from shardloss_server.numerics.correction import total_weights
from shardloss_server.shard.record import TableSpec

ROUNDING = 1e-3  # weights in bfloat16 that add up to 1 may exceed it


def loss_request(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """Check a ComputeLoss against its table and the limits.

    Raises:
        InvalidArgument, LimitExceeded: the request is not valid; the error names the field and, for values, the first
            offending index.
    """
    key(request, limits)
    hidden(request.hidden, spec, limits)
    num_rows = len(request.hidden)
    if request.label_columns is None:
        labels(request.labels, num_rows, spec.num_classes, request.ignore_index, limits)
        label_rows(request.labels, spec, limits)
    else:
        distribution_request(request)
    if request.label_weights is not None:
        label_weights(request, spec)
    if request.upstream is not None:
        vector("upstream", request.upstream, num_rows, spec)
    objective(request, spec)
    if request.sampled is not None:
        candidates(request, spec, limits)
    if request.commit_now is not None:
        rate(request.commit_now.learning_rate, "commit_now.learning_rate", spec)
        finite_number(request.commit_now.grad_scale, "commit_now.grad_scale")
        if request.upstream is not None:
            finite(request.upstream.double() * request.commit_now.grad_scale, "upstream", spec)
    reply_size(request, spec)
    fan_out(request, spec, limits)


def key(request: LossRequest, limits: Limits) -> None:
    """Check that session, step, part and after_step fit together."""
    if not request.session:
        if request.commit_now is not None:
            raise InvalidArgument(
                "commit_now needs a session: its key makes the commit happen exactly once", field="session"
            )
        if request.after_step is not None:
            raise InvalidArgument("after_step names a step of a session, but session is empty", field="session")
        at_least(request.step, 0, "step")
        return
    session(request.session)
    at_least(request.step, 1, "step")
    at_least(request.part, 0, "part")
    if request.part >= limits.max_parts:
        raise LimitExceeded(f"part = {request.part} is not below max_parts = {limits.max_parts}", field="part")
    if request.after_step is not None:
        at_least(request.after_step, 0, "after_step")
        if request.after_step >= request.step:
            raise InvalidArgument(
                f"after_step = {request.after_step} is not before step = {request.step}", field="after_step"
            )


def labels(tensor: Tensor, num_rows: int, num_classes: int, ignore_index: int | None, limits: Limits) -> None:
    """Check labels: [N, T] class ids in [0, V) or equal to ignore_index."""
    if tensor.dim() != 2 or len(tensor) != num_rows or tensor.shape[1] == 0:
        raise InvalidArgument(
            f"labels has shape {list(tensor.shape)}; [{num_rows}, T] with T >= 1 is needed", field="labels"
        )
    if tensor.shape[1] > limits.max_num_true:
        raise LimitExceeded(
            f"labels has T = {tensor.shape[1]}, above max_num_true = {limits.max_num_true}", field="labels"
        )
    label_ids(tensor, num_classes, ignore_index)


def label_list(tensor: Tensor, num_rows: int, num_classes: int, ignore_index: int | None) -> None:
    """Check labels: [N] class ids in [0, V) or equal to ignore_index."""
    if tensor.dim() != 1 or len(tensor) != num_rows:
        raise InvalidArgument(f"labels has shape {list(tensor.shape)}; [{num_rows}] is needed", field="labels")
    label_ids(tensor, num_classes, ignore_index)


def label_ids(tensor: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Check that labels are class ids in [0, V) or equal to ignore_index."""
    now = "" if ignore_index is None else f" (now {ignore_index})"
    hint = (
        ": class ids are zero-based; is there an end-of-text token in the batch? To leave labels out, as padding, pass "
        f"their value as ignore_index{now}"
    )
    class_ids(tensor, num_classes, "labels", ignore_index, hint)


def label_rows(tensor: Tensor, spec: TableSpec, limits: Limits) -> None:
    """Check that the gathered rows of all labels stay within max_request_bytes."""
    num_bytes = tensor.numel() * spec.dim * width_of(spec)
    if num_bytes > limits.max_request_bytes:
        raise LimitExceeded(
            f"the rows of labels {list(tensor.shape)} take {num_bytes} bytes, above max_request_bytes = "
            f"{limits.max_request_bytes}; split the batch",
            field="labels",
        )


def label_weights(request: LossRequest, spec: TableSpec) -> None:
    """Check label weights: [N, T], finite and not negative; in losses over all classes only."""
    weights = request.label_weights
    assert weights is not None
    if request.sampled is not None:
        raise InvalidArgument("only losses over all classes support label_weights", field="label_weights")
    if weights.shape != request.labels.shape or weights.dtype not in FLOATS:
        raise InvalidArgument(
            f"label_weights is {name_of(weights)} {list(weights.shape)}; a float tensor of the labels' shape "
            f"{list(request.labels.shape)} is needed",
            field="label_weights",
        )
    finite(weights, "label_weights", spec)
    refuse_where(weights < 0, weights, "label_weights", "is negative")
    finite(weights.to(getattr(torch, spec.compute_dtype)).sum(1), "label_weights", spec)
    if request.objective.family == "logistic":
        targets(request, weights)


def targets(request: LossRequest, weights: Tensor) -> None:
    """Check the weights of a full sigmoid: the target of a class, the sum of its weights in a row, is at most 1.

    Above 1 the loss would have no lower bound.
    """
    ignored = torch.zeros_like(weights, dtype=torch.bool)
    if request.ignore_index is not None:
        ignored = request.labels == request.ignore_index
    total = total_weights(request.labels, torch.where(ignored, 0.0, weights.double()))
    complaint = "is above 1: in a full sigmoid, the weights of a class in a row add up to its target"
    refuse_where(total > 1 + ROUNDING, total, "label_weights", complaint)


def distribution_request(request: LossRequest) -> None:
    """Refuse the options that do not combine with labels that are sent as columns."""
    field, one = "label_columns", request.objective
    refuse_if(request.sampled is not None or one.family != "softmax", "only the full softmax supports them", field)
    refuse_if(request.labels.numel() > 0, "leave labels out if label_columns are sent", "labels")
    refuse_if(request.label_weights is not None, "leave it out: label_columns are weights already", "label_weights")
    refuse_if(request.ignore_index is not None, "with label_columns, a row of zeros is ignored instead", "ignore_index")
    refuse_if(
        request.class_weights is not None,
        "with label_columns, multiply the columns instead",
        "full_softmax.class_weights",
    )
    refuse_if(
        one.label_smoothing != 0, "with label_columns, smooth the columns instead", "full_softmax.label_smoothing"
    )
    refuse_if(one.margin is not None, "a margin needs one label per row", "margin")
    refuse_if(one.transform.soft_cap is not None, "label_columns do not combine with a soft cap", "logits.soft_cap")
    refuse_if(bool(request.session) and request.commit_now is None, "with a session they need commit_now", field)


def label_columns(piece: LabelColumns, end: int, num_rows: int, spec: TableSpec) -> int:
    """Check a piece of a label distribution, which must start at class `end` or later; return the piece's own end."""
    field, weights = "columns.weights", piece.weights
    if weights.dim() != 2 or len(weights) != num_rows or weights.dtype not in FLOATS or weights.shape[1] == 0:
        raise InvalidArgument(
            f"{field} is {name_of(weights)} {list(weights.shape)}; floats [{num_rows}, C] are needed", field=field
        )
    own_end = piece.first_class + weights.shape[1]
    if piece.first_class < end or own_end > spec.num_classes:
        raise InvalidArgument(
            f"columns.first_class = {piece.first_class} with {weights.shape[1]} columns is not within "
            f"[{end}, {spec.num_classes}]",
            field="columns.first_class",
        )
    finite(weights, field, spec)
    refuse_where(weights < 0, weights, field, "is negative")
    return own_end


def fan_out(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """Check the size of all shards' answers to a batch.

    For each row of the batch, a shard answers with four float64 numbers, and with two rows of D if a gradient is
    wanted. For a piece of a label distribution, the answer always has a row of D.
    """
    num_rows_answered = 2 if request.want.hidden_grad else int(request.label_columns is not None)
    per_row = 32 + num_rows_answered * spec.dim * width_of(spec)
    answered_bytes(spec.placement.num_shards * len(request.hidden) * per_row, "hidden", limits)


def reply_size(request: LossRequest, spec: TableSpec) -> None:
    """Check that the reply fits in max_reply_bytes; a table gradient of the full softmax has V rows."""
    num_bytes = reply_bytes(request, spec)
    if num_bytes > request.max_reply_bytes:
        raise LimitExceeded(
            f"the reply would take up to {num_bytes} bytes, above {request.max_reply_bytes}; request fewer results, "
            "split the batch, or use StreamLoss",
            field="want_table_grad" if request.want.table_grad else "want_hidden_grad",
        )


def reply_bytes(request: LossRequest, spec: TableSpec) -> int:
    """Return the largest possible size of the reply's tensors, in bytes."""
    width = width_of(spec)
    num_rows = len(request.hidden)
    num_bytes = num_rows * width * (request.want.loss + request.want.lse + request.objective.learned_scale)
    if request.want.hidden_grad:
        grad_width = getattr(torch, request.want.grad_dtype).itemsize if request.want.grad_dtype else width
        num_bytes += num_rows * spec.dim * grad_width
    if request.want.table_grad:
        num_bytes += num_touched(request, spec) * (8 + (spec.dim + 1) * width)
    return num_bytes


def num_touched(request: LossRequest, spec: TableSpec) -> int:
    """Return the largest possible number of table rows that have a gradient."""
    if request.sampled is None:
        return spec.num_classes
    return min(spec.num_classes, num_drawn(request, spec) + request.labels.numel())
