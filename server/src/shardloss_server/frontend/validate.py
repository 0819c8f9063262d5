"""Every rejection of a loss or commit happens here, before any work."""

from __future__ import annotations

import math

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend.request import CommitRequest, LossRequest, SampledValues, SamplerSpec
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import TableSpec

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_SESSION_CHARS = 64


def loss_request(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """Check a ComputeLoss against its table and the limits.

    Raises:
        InvalidArgument, LimitExceeded: naming the field and, for values, the first offending index.
    """
    key(request, limits)
    hidden(request.hidden, spec, limits)
    num_rows = len(request.hidden)
    labels(request.labels, num_rows, spec.num_classes, request.ignore_index, limits)
    label_rows(request.labels, spec, limits)
    if request.label_weights is not None:
        label_weights(request, spec)
    if request.upstream is not None:
        vector("upstream", request.upstream, num_rows, spec)
    if request.sampled is not None:
        candidates(request, spec, limits)
    if request.commit_now is not None:
        rate(request.commit_now.learning_rate, "commit_now.learning_rate", spec)
        finite_number(request.commit_now.grad_scale, "commit_now.grad_scale")
        if request.upstream is not None:
            finite(request.upstream.double() * request.commit_now.grad_scale, "upstream", spec)
    reply_size(request, spec)
    fan_out(request, spec, limits)


def commit_request(request: CommitRequest, spec: TableSpec, limits: Limits) -> None:
    """Check what a Commit says by itself; its tickets are looked up later."""
    session(request.session)
    at_least(request.step, 1, "step")
    if not request.parts:
        raise InvalidArgument("parts is empty; a commit needs at least one ticket", field="parts")
    if len(request.parts) > limits.max_parts:
        raise LimitExceeded(f"{len(request.parts)} parts exceed max_parts = {limits.max_parts}", field="parts")
    seen: set[str] = set()
    for place, part in enumerate(request.parts):
        if part.ticket in seen:
            raise InvalidArgument(f"parts[{place}].ticket names a ticket twice", field="parts", index=place)
        seen.add(part.ticket)
        if part.g is not None:
            vector(f"parts[{place}].g", part.g, None, spec)
    rate(request.learning_rate, "learning_rate", spec)
    finite_number(request.grad_scale, "grad_scale")
    if request.max_staleness is not None:
        at_least(request.max_staleness, 0, "max_staleness")


def key(request: LossRequest, limits: Limits) -> None:
    """Session, step and part fit together."""
    if not request.session:
        if request.commit_now is not None:
            raise InvalidArgument("commit_now needs a session: exactly once is promised by its key", field="session")
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


def session(name: str) -> None:
    """A session's name is 1 to 64 printable characters."""
    if not name or len(name) > MAX_SESSION_CHARS or not name.isprintable():
        raise InvalidArgument(f"session must be 1 to {MAX_SESSION_CHARS} printable characters", field="session")


def hidden(tensor: Tensor, spec: TableSpec, limits: Limits, field: str = "hidden") -> None:
    """[N, D] of a float dtype, finite, N within the limits."""
    if tensor.dtype not in FLOATS:
        raise InvalidArgument(f"{field} is {name_of(tensor)}; a float dtype is needed", field=field)
    if tensor.dim() != 2 or tensor.shape[1] != spec.dim:
        raise InvalidArgument(f"{field} has shape {list(tensor.shape)}; [N, {spec.dim}] is needed", field=field)
    if len(tensor) > limits.max_batch:
        raise LimitExceeded(f"{field} has {len(tensor)} rows, above max_batch = {limits.max_batch}", field=field)
    finite(tensor, field, spec)


def labels(tensor: Tensor, num_rows: int, num_classes: int, ignore_index: int | None, limits: Limits) -> None:
    """[N, T] class ids in [0, V) or equal to ignore_index."""
    if tensor.dim() != 2 or len(tensor) != num_rows or tensor.shape[1] == 0:
        raise InvalidArgument(
            f"labels has shape {list(tensor.shape)}; [{num_rows}, T] with T >= 1 is needed", field="labels"
        )
    if tensor.shape[1] > limits.max_num_true:
        raise LimitExceeded(f"labels has T = {tensor.shape[1]}, above {limits.max_num_true}", field="labels")
    class_ids(
        tensor, num_classes, "labels", ignore_index, "; ids are zero-based; is an end-of-text token in the batch?"
    )


def label_list(tensor: Tensor, num_rows: int, num_classes: int, ignore_index: int | None) -> None:
    """[N] class ids in [0, V) or equal to ignore_index."""
    if tensor.dim() != 1 or len(tensor) != num_rows:
        raise InvalidArgument(f"labels has shape {list(tensor.shape)}; [{num_rows}] is needed", field="labels")
    class_ids(tensor, num_classes, "labels", ignore_index)


def class_ids(tensor: Tensor, num_classes: int, field: str, ignore: int | None = None, hint: str = "") -> None:
    """Every id of an int64 tensor is in [0, V) or equals ignore."""
    wrong = (tensor < 0) | (tensor >= num_classes)
    if ignore is not None:
        wrong &= tensor != ignore
    if wrong.any():
        index = first_index(wrong)
        raise InvalidArgument(
            f"{field}[{show(index)}] = {int(tensor[tuple(index)])} is outside [0, {num_classes}){hint}",
            field=field,
            index=show(index),
        )


def id_list(tensor: Tensor, num_classes: int) -> None:
    """class_ids [M] in range."""
    if tensor.dim() != 1:
        raise InvalidArgument(f"class_ids has shape {list(tensor.shape)}; [M] is needed", field="class_ids")
    class_ids(tensor, num_classes, "class_ids")


def row_write(ids: Tensor, rows: Tensor, biases: Tensor | None, spec: TableSpec, limits: Limits) -> None:
    """Rows to overwrite: class_ids [M] distinct, rows [M, D], biases [M] where the table has them."""
    id_list(ids, spec.num_classes)
    order = torch.argsort(ids, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[order[1:]] = ids[order][1:] == ids[order][:-1]
    if repeated.any():
        index = first_index(repeated)
        place, class_id = show(index), int(ids[index[0]])
        raise InvalidArgument(f"class_ids[{place}] = {class_id} is there twice", field="class_ids", index=place)
    hidden(rows, spec, limits, field="rows")
    refuse_where(~torch.isfinite(rows.to(getattr(torch, spec.dtype))), rows, "rows", f"overflows {spec.dtype}")
    if len(rows) != len(ids):
        raise InvalidArgument(f"rows has {len(rows)} rows for {len(ids)} class_ids", field="rows")
    if biases is None:
        return
    if not spec.bias:
        raise InvalidArgument("this table has no biases", field="biases")
    vector("biases", biases, len(ids), spec)


def label_rows(tensor: Tensor, spec: TableSpec, limits: Limits) -> None:
    """The rows of all labels, gathered, stay within max_request_bytes."""
    num_bytes = tensor.numel() * spec.dim * width_of(spec)
    if num_bytes > limits.max_request_bytes:
        raise LimitExceeded(
            f"labels {list(tensor.shape)} gather {num_bytes} bytes of rows, above {limits.max_request_bytes}; "
            "split the batch",
            field="labels",
        )


def label_weights(request: LossRequest, spec: TableSpec) -> None:
    """[N, T] finite and not negative; full softmax only."""
    weights = request.label_weights
    assert weights is not None
    if request.sampled is not None:
        raise InvalidArgument("label_weights belong to the full softmax; sampled uses 1/T", field="label_weights")
    if weights.shape != request.labels.shape or weights.dtype not in FLOATS:
        raise InvalidArgument(
            f"label_weights is {name_of(weights)} {list(weights.shape)}; a float tensor of the labels' shape "
            f"{list(request.labels.shape)} is needed",
            field="label_weights",
        )
    finite(weights, "label_weights", spec)
    refuse_where(weights < 0, weights, "label_weights", "is negative")
    finite(weights.to(getattr(torch, spec.compute_dtype)).sum(1), "label_weights", spec)


def fan_out(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """What all shards answer to a batch: two float64 a row, and two rows of D where a gradient is wanted."""
    per_row = 16 + (2 * spec.dim * width_of(spec) if request.want.hidden_grad else 0)
    answered_bytes(spec.placement.num_shards * len(request.hidden) * per_row, "hidden", limits)


def answered_bytes(num_bytes: int, field: str, limits: Limits) -> None:
    """What all shards answer together stays within four times max_reply_bytes."""
    most = 4 * limits.max_reply_bytes
    if num_bytes > most:
        raise LimitExceeded(f"{field} makes the shards answer {num_bytes} bytes, above {most}; split it", field=field)


def finite_logits(is_finite: Tensor, field: str, place: int | None = None) -> None:
    """No row's logits overflow: is_finite [N, ...] holds throughout. place stands for the row where that is elsewhere.

    Raises:
        InvalidArgument: the product of hidden and a row of the table is not finite.
    """
    if not is_finite.all():
        row = first_index(~is_finite)[0] if place is None else place
        raise InvalidArgument(
            f"{field}[{row}] has logits that are not finite: it, or a row of the table, is too large",
            field=field,
            index=row,
        )


def logit_transform(transform: Transform) -> None:
    """scale and soft_cap are positive and finite."""
    for name, value in (("scale", transform.scale), ("soft_cap", transform.soft_cap)):
        if value is not None and not 0 < value < math.inf:
            raise InvalidArgument(f"logits.{name} = {value} must be finite and above 0", field=f"logits.{name}")


def candidates(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """The sampler or the caller's draw."""
    assert request.sampled is not None
    draw = request.sampled.candidates
    if isinstance(draw, SamplerSpec):
        sampler(draw, spec, limits)
        return
    sampled_values(draw, request, spec, limits)


def sampler(draw: SamplerSpec, spec: TableSpec, limits: Limits) -> None:
    """num_sampled is positive, within the limits and, where distinct, at most V."""
    at_least(draw.num_sampled, 1, "sampler.num_sampled")
    if draw.num_sampled > limits.max_num_sampled:
        raise LimitExceeded(
            f"sampler.num_sampled = {draw.num_sampled} exceeds {limits.max_num_sampled}", field="sampler.num_sampled"
        )
    sampled_rows(draw.num_sampled, "sampler.num_sampled", spec, limits)
    if draw.unique and draw.num_sampled > spec.num_classes:
        raise InvalidArgument(
            f"sampler.num_sampled = {draw.num_sampled} distinct ids cannot come from {spec.num_classes} classes",
            field="sampler.num_sampled",
        )


def sampled_rows(num_sampled: int, field: str, spec: TableSpec, limits: Limits) -> None:
    """The rows of all candidates, gathered, stay within max_request_bytes."""
    num_bytes = num_sampled * spec.dim * width_of(spec)
    if num_bytes > limits.max_request_bytes:
        raise LimitExceeded(
            f"{num_sampled} candidates gather {num_bytes} bytes of rows, above {limits.max_request_bytes}", field=field
        )


def sampled_values(draw: SampledValues, request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """sampled [S] in range; both expected counts of the right shape, finite and positive where they count."""
    prefix = "sampled_values."
    if draw.sampled.dim() != 1:
        found = list(draw.sampled.shape)
        raise InvalidArgument(f"{prefix}sampled has shape {found}; [S] is needed", field=prefix + "sampled")
    if len(draw.sampled) > limits.max_num_sampled:
        message = f"{len(draw.sampled)} samples exceed {limits.max_num_sampled}"
        raise LimitExceeded(message, field=prefix + "sampled")
    sampled_rows(len(draw.sampled), prefix + "sampled", spec, limits)
    class_ids(draw.sampled, spec.num_classes, prefix + "sampled")
    for name, count, shape in (
        ("true_expected_count", draw.true_expected_count, request.labels.shape),
        ("sampled_expected_count", draw.sampled_expected_count, draw.sampled.shape),
    ):
        if count.shape != shape or count.dtype not in FLOATS:
            raise InvalidArgument(
                f"{prefix}{name} is {name_of(count)} {list(count.shape)}; floats {list(shape)} are needed",
                field=prefix + name,
            )
    counted = torch.ones_like(request.labels, dtype=torch.bool)
    if request.ignore_index is not None:
        counted = request.labels != request.ignore_index
    positive(draw.true_expected_count, counted, prefix + "true_expected_count")
    everywhere = torch.ones_like(draw.sampled, dtype=torch.bool)
    positive(draw.sampled_expected_count, everywhere, prefix + "sampled_expected_count")


def positive(count: Tensor, where: Tensor, field: str) -> None:
    """Q > 0 and finite wherever it counts: log Q must exist."""
    refuse_where(where & ~(torch.isfinite(count) & (count > 0)), count, field, "is not a positive finite count")


def reply_size(request: LossRequest, spec: TableSpec) -> None:
    """The reply fits what the call may carry back; a table gradient of the full softmax has V rows."""
    num_bytes = reply_bytes(request, spec)
    if num_bytes > request.max_reply_bytes:
        raise LimitExceeded(
            f"the reply would take up to {num_bytes} bytes, above {request.max_reply_bytes}; ask for less, split the "
            "batch, or call through StreamLoss",
            field="want_table_grad" if request.want.table_grad else "want_hidden_grad",
        )


def reply_bytes(request: LossRequest, spec: TableSpec) -> int:
    """At most so many bytes of tensors answer a request."""
    width = width_of(spec)
    num_rows = len(request.hidden)
    num_bytes = num_rows * width * (request.want.loss + request.want.lse)
    if request.want.hidden_grad:
        grad_width = getattr(torch, request.want.grad_dtype).itemsize if request.want.grad_dtype else width
        num_bytes += num_rows * spec.dim * grad_width
    if request.want.table_grad:
        num_bytes += num_touched(request, spec) * (8 + (spec.dim + 1) * width)
    return num_bytes


def num_touched(request: LossRequest, spec: TableSpec) -> int:
    """At most so many rows have a gradient."""
    if request.sampled is None:
        return spec.num_classes
    return min(spec.num_classes, num_drawn(request) + request.labels.numel())


def num_drawn(request: LossRequest) -> int:
    """S; 0 in the full softmax."""
    if request.sampled is None:
        return 0
    draw = request.sampled.candidates
    return draw.num_sampled if isinstance(draw, SamplerSpec) else len(draw.sampled)


def width_of(spec: TableSpec) -> int:
    """Bytes of one element in compute dtype."""
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    return dtype.itemsize


def vector(field: str, tensor: Tensor, num_rows: int | None, spec: TableSpec | None = None) -> None:
    """[N] floats, finite."""
    if tensor.dtype not in FLOATS or tensor.dim() != 1 or (num_rows is not None and len(tensor) != num_rows):
        shape = f"[{'N' if num_rows is None else num_rows}]"
        raise InvalidArgument(
            f"{field} is {name_of(tensor)} {list(tensor.shape)}; floats {shape} are needed", field=field
        )
    finite(tensor, field, spec)


def finite(tensor: Tensor, field: str, spec: TableSpec | None = None) -> None:
    """No NaN, no Inf, also once it is in the table's compute dtype."""
    if spec is not None:
        tensor = tensor.to(getattr(torch, spec.compute_dtype))
    refuse_where(~torch.isfinite(tensor), tensor, field, "is not finite")


def refuse_where(wrong: Tensor, tensor: Tensor, field: str, complaint: str) -> None:
    """Refuse a tensor with any wrong entry, naming the first."""
    if wrong.any():
        index = first_index(wrong)
        value = float(tensor[tuple(index)])
        raise InvalidArgument(f"{field}[{show(index)}] = {value} {complaint}", field=field, index=show(index))


def rate(value: float, field: str, spec: TableSpec) -> None:
    """A learning rate is not negative, and finite in the table's compute dtype."""
    if not 0 <= value <= torch.finfo(getattr(torch, spec.compute_dtype)).max:
        raise InvalidArgument(f"{field} = {value} must be finite and >= 0", field=field)


def finite_number(value: float, field: str) -> None:
    """No NaN, no Inf."""
    if not math.isfinite(value):
        raise InvalidArgument(f"{field} = {value} must be finite", field=field)


def at_least(value: int, least: int, field: str) -> None:
    """An integer is not below its least value."""
    if value < least:
        raise InvalidArgument(f"{field} = {value} must be at least {least}", field=field)


def first_index(wrong: Tensor) -> list[int]:
    """Index of the first True in row-major order."""
    return [int(i) for i in torch.nonzero(wrong)[0]]


def show(index: list[int]) -> str:
    """An index as it stands between brackets."""
    return ", ".join(map(str, index))


def name_of(tensor: Tensor) -> str:
    """dtype without the module."""
    return str(tensor.dtype).removeprefix("torch.")
