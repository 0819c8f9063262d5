"""Checks of the candidates of a sampled loss: samplers, the caller's draws, and labels of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend.request import (
    InBatch,
    LossRequest,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
)
from shardloss_server.frontend.validate.tensors import (
    FLOATS,
    answered_bytes,
    at_least,
    class_ids,
    finite_number,
    in_range,
    name_of,
    refuse_if,
    refuse_where,
    width_of,
)
from shardloss_server.shard.record import TableSpec


def candidates(request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """Check the source of the candidates (a sampler, the caller's draw or the batch), hit ids and hard negatives."""
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
    """Check partial_fc: at least one class, no more than V, and within the limits."""
    field = "partial_fc.num_sampled"
    at_least(draw.num_sampled, 1, field)
    if draw.num_sampled > spec.num_classes:
        raise InvalidArgument(
            f"{field} = {draw.num_sampled} exceeds the table's {spec.num_classes} classes", field=field
        )
    if draw.num_sampled > limits.max_num_sampled:
        raise LimitExceeded(
            f"{field} = {draw.num_sampled} exceeds max_num_sampled = {limits.max_num_sampled}", field=field
        )
    sampled_rows(max(draw.num_sampled, request.labels.numel()), field, spec, limits)


def in_batch(draw: InBatch, request: LossRequest, spec: TableSpec) -> None:
    """Check in_batch: one label per row, and a table that counts its labels if logits are corrected."""
    refuse_if(request.labels.shape[1] != 1, "in_batch needs one label per row", "labels")
    if draw.is_corrected:
        refuse_if(not spec.count_labels, "the table must be created with count_labels", "in_batch.correct_log_q")


def hit_ids(request: LossRequest, sampled: SampledSoftmax) -> None:
    """Check hit ids: not negative, in the shapes of the labels and the draw, and only if hits are removed."""
    ids, draw = sampled.hit_ids, sampled.candidates
    assert ids is not None
    if isinstance(draw, (SamplerSpec, PartialFc)):
        raise InvalidArgument("hit_ids need sampled_values or in_batch", field="hit_ids")
    if isinstance(draw, InBatch):
        refuse_if(ids.sampled is not None, "in_batch accepts hit ids for the labels only", "hit_ids.sampled")
        refuse_if(sampled.hit_removal != "every", "with in_batch, hit_removal must be HIT_REMOVAL_EVERY", "hit_ids")
    elif ids.sampled is None or ids.sampled.shape != draw.sampled.shape:
        raise InvalidArgument(f"hit_ids.sampled must have shape {list(draw.sampled.shape)}", field="hit_ids.sampled")
    else:
        refuse_where(ids.sampled < 0, ids.sampled, "hit_ids.sampled", "is negative")
    if ids.labels.shape != request.labels.shape:
        raise InvalidArgument(f"hit_ids.labels must have shape {list(request.labels.shape)}", field="hit_ids.labels")
    refuse_where(ids.labels < 0, ids.labels, "hit_ids.labels", "is negative")
    refuse_if(sampled.hit_removal == "none", "accidental hits are not removed, so hit ids have no effect", "hit_ids")


def hard_negatives(request: LossRequest, sampled: SampledSoftmax, spec: TableSpec, limits: Limits) -> None:
    """Check hard negatives: a softmax over shared candidates, and the shards' answers within the limits."""
    field, k = "sampled_softmax.num_hard_negatives", sampled.num_hard_negatives
    at_least(k, 0, field)
    if k == 0:
        return
    draw = sampled.candidates
    refuse_if(request.objective.family == "logistic", "hard negatives need a softmax loss", field)
    refuse_if(
        isinstance(draw, SampledValues) and draw.sampled.dim() == 2,
        "hard negatives need candidates that all rows share",
        field,
    )
    if k > limits.max_top_k:
        raise LimitExceeded(f"{field} = {k} exceeds max_top_k = {limits.max_top_k}", field=field)
    per_row = min(k, num_drawn(request, spec)) * (8 + 2 * width_of(spec))
    answered_bytes(spec.placement.num_shards * len(request.hidden) * per_row, field, limits)


def sampler(draw: SamplerSpec, spec: TableSpec, limits: Limits) -> None:
    """Check a sampler: num_sampled positive, within the limits and, if distinct, at most V; a valid distribution."""
    if draw.kind == "all":
        if draw.num_sampled not in (0, spec.num_classes):
            raise InvalidArgument(
                f"sampler.num_sampled = {draw.num_sampled}; with KIND_ALL it must be 0 or {spec.num_classes}",
                field="sampler.num_sampled",
            )
    else:
        at_least(draw.num_sampled, 1, "sampler.num_sampled")
    num_sampled = filled_in(draw, spec).num_sampled
    if num_sampled > limits.max_num_sampled:
        raise LimitExceeded(
            f"sampler.num_sampled = {num_sampled} exceeds max_num_sampled = {limits.max_num_sampled}",
            field="sampler.num_sampled",
        )
    sampled_rows(num_sampled, "sampler.num_sampled", spec, limits)
    if draw.unique and num_sampled > spec.num_classes:
        raise InvalidArgument(
            f"sampler.num_sampled = {num_sampled} distinct ids cannot come from {spec.num_classes} classes",
            field="sampler.num_sampled",
        )
    distribution(draw, spec, "sampler")


def distribution(draw: SamplerSpec, spec: TableSpec, field: str) -> None:
    """Check the distribution of a sampler: its kind and the options of that kind."""
    in_range(draw.distortion, f"{field}.distortion", 0.0, math.inf)
    finite_number(draw.distortion, f"{field}.distortion")
    if not 0 <= draw.num_reserved_ids < spec.num_classes:
        raise InvalidArgument(
            f"{field}.num_reserved_ids = {draw.num_reserved_ids} is outside [0, {spec.num_classes})",
            field=f"{field}.num_reserved_ids",
        )
    if draw.kind == "learned_unigram" and not spec.count_labels:
        raise InvalidArgument(
            "learned_unigram needs a table that counts its labels; create the table with count_labels",
            field=f"{field}.kind",
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
    """Check a sampler inside a mixture: it may only describe a distribution."""
    if draw.kind in ("mixture", "all"):
        raise InvalidArgument(f"{field}.kind = {draw.kind} cannot be part of a mixture", field=f"{field}.kind")
    refuse_if(draw.num_sampled != 0, "set num_sampled on the mixture, not on a part of it", f"{field}.num_sampled")
    refuse_if(draw.seed != 0, "set seed on the mixture, not on a part of it", f"{field}.seed")
    refuse_if(not draw.unique, "set unique on the mixture, not on a part of it", f"{field}.unique")
    distribution(draw, spec, field)


def filled_in(draw: SamplerSpec, spec: TableSpec) -> SamplerSpec:
    """Return the sampler with num_sampled filled in: V if its kind is "all"."""
    return replace(draw, num_sampled=spec.num_classes) if draw.kind == "all" else draw


def sampled_rows(num_sampled: int, field: str, spec: TableSpec, limits: Limits) -> None:
    """Check that the gathered rows of all candidates stay within max_request_bytes."""
    num_bytes = num_sampled * spec.dim * width_of(spec)
    if num_bytes > limits.max_request_bytes:
        raise LimitExceeded(
            f"the rows of {num_sampled} candidates take {num_bytes} bytes, above max_request_bytes = "
            f"{limits.max_request_bytes}",
            field=field,
        )


def sampled_values(draw: SampledValues, request: LossRequest, spec: TableSpec, limits: Limits) -> None:
    """Check the caller's draw: sampled [S] or [N, S] in range, and both expected counts.

    The counts must have the right shape, and be finite and positive except on padding.
    """
    prefix = "sampled_values."
    found, num_rows, num_drawn = list(draw.sampled.shape), len(request.hidden), draw.sampled.numel()
    if len(found) not in (1, 2) or (len(found) == 2 and found[0] != num_rows):
        raise InvalidArgument(
            f"{prefix}sampled has shape {found}; [S] or [{num_rows}, S] is needed", field=prefix + "sampled"
        )
    if num_drawn > limits.max_num_sampled:
        raise LimitExceeded(
            f"{num_drawn} samples exceed max_num_sampled = {limits.max_num_sampled}", field=prefix + "sampled"
        )
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
    """Check that Q is positive and finite wherever it counts, so that log Q exists."""
    refuse_where(where & ~(torch.isfinite(count) & (count > 0)), count, field, "is not a positive finite count")


def num_drawn(request: LossRequest, spec: TableSpec) -> int:
    """Return the largest possible number of candidates over all rows; 0 in a loss over all classes."""
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
