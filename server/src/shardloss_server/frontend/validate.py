"""Every rejection of a loss or commit happens here, before any work."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend.request import (
    CommitRequest,
    InBatch,
    LabelColumns,
    LossRequest,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
)
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
    """[N, T] finite and not negative; losses over all classes only."""
    weights = request.label_weights
    assert weights is not None
    if request.sampled is not None:
        raise InvalidArgument("label_weights belong to losses over all classes", field="label_weights")
    if weights.shape != request.labels.shape or weights.dtype not in FLOATS:
        raise InvalidArgument(
            f"label_weights is {name_of(weights)} {list(weights.shape)}; a float tensor of the labels' shape "
            f"{list(request.labels.shape)} is needed",
            field="label_weights",
        )
    finite(weights, "label_weights", spec)
    refuse_where(weights < 0, weights, "label_weights", "is negative")
    finite(weights.to(getattr(torch, spec.compute_dtype)).sum(1), "label_weights", spec)


def objective(request: LossRequest, spec: TableSpec) -> None:
    """The options of a loss, and which of them combine: docs/losses.md."""
    one = request.objective
    transform(one.transform, spec)
    in_range(one.label_smoothing, "full_softmax.label_smoothing", 0.0, 1.0)
    in_range(one.z_loss, "z_loss", 0.0, math.inf)
    finite_number(one.z_loss, "z_loss")
    if one.family == "logistic":
        refuse_if(one.z_loss != 0, "z_loss belongs to softmax losses", "z_loss")
        refuse_if(one.margin is not None, "a margin belongs to softmax losses", "margin")
        refuse_if(request.want.lse, "a logistic loss has no log-sum-exp", "want_lse")
    if one.label_smoothing:
        refuse_if(
            one.transform.soft_cap is not None, "label smoothing and a soft cap do not combine", "logits.soft_cap"
        )
    if request.class_weights is not None:
        class_weights(request.class_weights, spec)
    if one.margin is not None:
        margin(request, spec)


def distribution_request(request: LossRequest) -> None:
    """Labels that come as columns: what they do not combine with."""
    field, one = "label_columns", request.objective
    refuse_if(request.sampled is not None or one.family != "softmax", "they belong to the full softmax", field)
    refuse_if(request.labels.numel() > 0, "labels stay absent beside them", "labels")
    refuse_if(request.label_weights is not None, "they are weights themselves", "label_weights")
    refuse_if(request.ignore_index is not None, "a row of zeros does not count", "ignore_index")
    refuse_if(request.class_weights is not None, "multiply the columns instead", "full_softmax.class_weights")
    refuse_if(one.label_smoothing != 0, "smooth the columns instead", "full_softmax.label_smoothing")
    refuse_if(one.margin is not None, "a margin needs one label a row", "margin")
    refuse_if(one.transform.soft_cap is not None, "they do not combine with a soft cap", "logits.soft_cap")
    refuse_if(bool(request.session) and request.commit_now is None, "a session needs commit_now with them", field)


def label_columns(piece: LabelColumns, end: int, num_rows: int, spec: TableSpec) -> int:
    """A piece of a label distribution stands behind the classes before `end`; the end of its own."""
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


def margin(request: LossRequest, spec: TableSpec) -> None:
    """A margin's numbers, and what it does not combine with."""
    one = request.objective.margin
    assert one is not None
    in_range(one.m1, "margin.m1", 0.0, math.inf)
    for name, value in (("m1", one.m1), ("m2", one.m2), ("m3", one.m3)):
        finite_number(value, f"margin.{name}")
    refuse_if(request.labels.shape[1] != 1, "a margin needs one label a row", "labels")
    refuse_if(spec.bias, "a margin needs a table without biases: a biased logit is no cosine", "margin")
    refuse_if(request.label_weights is not None, "a margin takes no label_weights", "label_weights")
    refuse_if(request.class_weights is not None, "a margin takes no class_weights", "full_softmax.class_weights")
    smoothing, cap = request.objective.label_smoothing, request.objective.transform.soft_cap
    refuse_if(smoothing != 0, "a margin takes no label smoothing", "full_softmax.label_smoothing")
    refuse_if(cap is not None, "a margin takes no soft cap", "logits.soft_cap")


def transform(one: Transform, spec: TableSpec) -> None:
    """Scale and soft cap are positive and finite in the table's compute dtype."""
    limits = torch.finfo(getattr(torch, spec.compute_dtype))
    for name, value in (("scale", one.scale), ("soft_cap", one.soft_cap)):
        if value is not None and not limits.tiny <= value <= limits.max:
            raise InvalidArgument(
                f"logits.{name} = {value} must be finite and above 0 in {spec.compute_dtype}", field=f"logits.{name}"
            )


def class_weights(weights: Tensor, spec: TableSpec) -> None:
    """[V] finite and not negative."""
    field = "full_softmax.class_weights"
    vector(field, weights, None, spec)
    refuse_if(len(weights) != spec.num_classes, f"{field} has {len(weights)} of {spec.num_classes} classes", field)
    refuse_where(weights < 0, weights, field, "is negative")
    finite(weights.double().sum()[None], field, spec)


def class_counts(first_class: int, counts: Tensor, spec: TableSpec, limits: Limits) -> None:
    """Counts [M] of a range of classes: finite, not negative, within the table."""
    at_least(first_class, 0, "first_class")
    vector("counts", counts, None)
    refuse_where(counts < 0, counts, "counts", "is negative")
    if first_class + len(counts) > spec.num_classes:
        raise InvalidArgument(
            f"first_class = {first_class} and {len(counts)} counts exceed {spec.num_classes} classes",
            field="first_class",
        )
    if 40 * spec.num_classes > limits.max_table_bytes:
        raise LimitExceeded(f"counts of {spec.num_classes} classes do not fit max_table_bytes", field="counts")


def refuse_if(wrong: bool, complaint: str, field: str) -> None:
    """Refuse what does not combine."""
    if wrong:
        raise InvalidArgument(f"{field}: {complaint}", field=field)


def in_range(value: float, field: str, least: float, most: float) -> None:
    """least <= value <= most."""
    if not least <= value <= most:
        raise InvalidArgument(f"{field} = {value} is outside [{least}, {most}]", field=field)


def fan_out(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """What all shards answer to a batch: four float64 a row, and two rows of D where a gradient is wanted."""
    per_row = 32 + (2 * spec.dim * width_of(spec) if request.want.hidden_grad else 0)
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


def candidates(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """The sampler, the caller's draw, or what the batch gives; and what else is said of the columns."""
    sampled = request.sampled
    assert sampled is not None
    draw = sampled.candidates
    if isinstance(draw, SamplerSpec):
        sampler(draw, spec, limits)
    elif isinstance(draw, SampledValues):
        sampled_values(draw, request, spec, limits)
    elif isinstance(draw, PartialFc):
        partial_fc(draw, request, spec, limits)
    else:
        in_batch(draw, request, spec)
    if sampled.hit_ids is not None:
        hit_ids(request, sampled)
    hard_negatives(request, sampled, spec, limits)


def partial_fc(draw: PartialFc, request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """At least one class, and no more than V."""
    field = "partial_fc.num_sampled"
    at_least(draw.num_sampled, 1, field)
    if draw.num_sampled > spec.num_classes:
        raise InvalidArgument(f"{field} = {draw.num_sampled} exceeds {spec.num_classes} classes", field=field)
    if draw.num_sampled > limits.max_num_sampled:
        raise LimitExceeded(f"{field} = {draw.num_sampled} exceeds {limits.max_num_sampled}", field=field)
    sampled_rows(max(draw.num_sampled, request.labels.numel()), field, spec, limits)


def in_batch(draw: InBatch, request: LossRequest, spec: TableSpec) -> None:
    """One label a row; its frequency is known where logits are corrected."""
    refuse_if(request.labels.shape[1] != 1, "in_batch needs one label a row", "labels")
    if draw.is_corrected:
        refuse_if(not spec.count_labels, "it needs a table with count_labels", "in_batch.correct_log_q")


def hit_ids(request: LossRequest, sampled: SampledSoftmax) -> None:
    """Ids of the labels' and the draw's shapes, not negative, where hits are removed."""
    ids, draw = sampled.hit_ids, sampled.candidates
    assert ids is not None
    if isinstance(draw, (SamplerSpec, PartialFc)):
        raise InvalidArgument("hit_ids go with sampled_values or in_batch", field="hit_ids")
    if isinstance(draw, InBatch):
        refuse_if(ids.sampled is not None, "in_batch takes the labels' hit ids alone", "hit_ids.sampled")
        refuse_if(sampled.hit_removal != "every", "in_batch hit_ids need every hit removed", "hit_ids")
    elif ids.sampled is None or ids.sampled.shape != draw.sampled.shape:
        raise InvalidArgument(f"hit_ids.sampled must have shape {list(draw.sampled.shape)}", field="hit_ids.sampled")
    else:
        refuse_where(ids.sampled < 0, ids.sampled, "hit_ids.sampled", "is negative")
    if ids.labels.shape != request.labels.shape:
        raise InvalidArgument(f"hit_ids.labels must have shape {list(request.labels.shape)}", field="hit_ids.labels")
    refuse_where(ids.labels < 0, ids.labels, "hit_ids.labels", "is negative")
    refuse_if(sampled.hit_removal == "none", "hits are not removed, so nothing is compared", "hit_ids")


def hard_negatives(request: LossRequest, sampled: SampledSoftmax, spec: TableSpec, limits: Limits) -> None:
    """Of a softmax over shared candidates; what all shards answer is bounded."""
    field, k = "sampled_softmax.num_hard_negatives", sampled.num_hard_negatives
    at_least(k, 0, field)
    if k == 0:
        return
    draw = sampled.candidates
    refuse_if(request.objective.family == "logistic", "hard negatives belong to the softmax", field)
    refuse_if(isinstance(draw, SampledValues) and draw.sampled.dim() == 2, "each row has its own candidates", field)
    if k > limits.max_top_k:
        raise LimitExceeded(f"{field} = {k} exceeds max_top_k = {limits.max_top_k}", field=field)
    per_row = min(k, num_drawn(request, spec)) * (8 + 2 * width_of(spec))
    answered_bytes(spec.placement.num_shards * len(request.hidden) * per_row, field, limits)


def sampler(draw: SamplerSpec, spec: TableSpec, limits: Limits) -> None:
    """num_sampled is positive, within the limits and, where distinct, at most V; the distribution is well-formed."""
    if draw.kind == "all":
        if draw.num_sampled not in (0, spec.num_classes):
            raise InvalidArgument(
                f"sampler.num_sampled = {draw.num_sampled}; all candidates are {spec.num_classes}",
                field="sampler.num_sampled",
            )
    else:
        at_least(draw.num_sampled, 1, "sampler.num_sampled")
    num_sampled = filled_in(draw, spec).num_sampled
    if num_sampled > limits.max_num_sampled:
        raise LimitExceeded(
            f"sampler.num_sampled = {num_sampled} exceeds {limits.max_num_sampled}", field="sampler.num_sampled"
        )
    sampled_rows(num_sampled, "sampler.num_sampled", spec, limits)
    if draw.unique and num_sampled > spec.num_classes:
        raise InvalidArgument(
            f"sampler.num_sampled = {num_sampled} distinct ids cannot come from {spec.num_classes} classes",
            field="sampler.num_sampled",
        )
    distribution(draw, spec, "sampler")


def distribution(draw: SamplerSpec, spec: TableSpec, field: str) -> None:
    """What a sampler draws by."""
    in_range(draw.distortion, f"{field}.distortion", 0.0, math.inf)
    finite_number(draw.distortion, f"{field}.distortion")
    if not 0 <= draw.num_reserved_ids < spec.num_classes:
        raise InvalidArgument(
            f"{field}.num_reserved_ids = {draw.num_reserved_ids} is outside [0, {spec.num_classes})",
            field=f"{field}.num_reserved_ids",
        )
    if draw.kind == "learned_unigram" and not spec.count_labels:
        raise InvalidArgument(
            "learned_unigram needs a table that counts its labels: create it with count_labels", field=f"{field}.kind"
        )
    if draw.kind != "mixture":
        refuse_if(draw.mixture is not None, "only KIND_MIXTURE has a mixture", f"{field}.mixture")
        return
    refuse_if(draw.mixture is None, "a mixture of two samplers is needed", f"{field}.mixture")
    assert draw.mixture is not None
    in_range(draw.mixture.share, f"{field}.mixture.share", 0.0, 1.0)
    for name in ("first", "second"):
        component(getattr(draw.mixture, name), spec, f"{field}.mixture.{name}")


def component(draw: SamplerSpec, spec: TableSpec, field: str) -> None:
    """A sampler inside a mixture is a distribution alone."""
    if draw.kind in ("mixture", "all"):
        raise InvalidArgument(f"{field}.kind = {draw.kind} cannot be part of a mixture", field=f"{field}.kind")
    refuse_if(draw.num_sampled != 0, "the mixture's own num_sampled counts", f"{field}.num_sampled")
    refuse_if(draw.seed != 0, "the mixture's own seed counts", f"{field}.seed")
    refuse_if(not draw.unique, "the mixture's own unique counts", f"{field}.unique")
    distribution(draw, spec, field)


def filled_in(draw: SamplerSpec, spec: TableSpec) -> SamplerSpec:
    """The sampler with its num_sampled: V for all candidates."""
    return replace(draw, num_sampled=spec.num_classes) if draw.kind == "all" else draw


def sampled_rows(num_sampled: int, field: str, spec: TableSpec, limits: Limits) -> None:
    """The rows of all candidates, gathered, stay within max_request_bytes."""
    num_bytes = num_sampled * spec.dim * width_of(spec)
    if num_bytes > limits.max_request_bytes:
        raise LimitExceeded(
            f"{num_sampled} candidates gather {num_bytes} bytes of rows, above {limits.max_request_bytes}", field=field
        )


def sampled_values(draw: SampledValues, request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """sampled [S] or [N, S] in range; both expected counts of the right shape, finite and positive where they count."""
    prefix = "sampled_values."
    found, num_rows, num_drawn = list(draw.sampled.shape), len(request.hidden), draw.sampled.numel()
    if len(found) not in (1, 2) or (len(found) == 2 and found[0] != num_rows):
        raise InvalidArgument(
            f"{prefix}sampled has shape {found}; [S] or [{num_rows}, S] is needed", field=prefix + "sampled"
        )
    if num_drawn > limits.max_num_sampled:
        raise LimitExceeded(f"{num_drawn} samples exceed {limits.max_num_sampled}", field=prefix + "sampled")
    sampled_rows(min(num_drawn, spec.num_classes), prefix + "sampled", spec, limits)
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
    num_bytes = num_rows * width * (request.want.loss + request.want.lse + request.objective.learned_scale)
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
    return min(spec.num_classes, num_drawn(request, spec) + request.labels.numel())


def num_drawn(request: LossRequest, spec: TableSpec) -> int:
    """At most so many candidates, over all rows; 0 in a loss over all classes."""
    if request.sampled is None:
        return 0
    draw = request.sampled.candidates
    if isinstance(draw, SampledValues):
        return draw.sampled.numel()
    if isinstance(draw, InBatch):
        return request.labels.numel()
    if isinstance(draw, SamplerSpec):
        return filled_in(draw, spec).num_sampled
    return max(draw.num_sampled, request.labels.numel())


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
