"""Planning: from a valid request to a part that every shard can score. Pure: (request, spec) -> part."""

from __future__ import annotations

import numpy as np
import torch
from shardloss.errors import InvalidArgument
from torch import Tensor

from shardloss_server.frontend.request import LossRequest, SampledValues, SamplerSpec
from shardloss_server.numerics import sampler
from shardloss_server.numerics.correction import fold_repeats
from shardloss_server.shard.record import Batch, Candidates, Part, TableSpec

PADDING = -1


def plan(request: LossRequest, spec: TableSpec) -> Part:
    """The part of a request: padding marked, weights filled in, candidates drawn and their repeats folded.

    Raises:
        InvalidArgument: a distinct draw would take too many tries.
    """
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    labels = request.labels
    if request.ignore_index is not None:
        labels = torch.where(labels == request.ignore_index, PADDING, labels)
    weights = weights_of(labels, request.label_weights, dtype)
    mass = weights.sum(1)
    hidden = request.hidden.to(dtype)
    if (mass == 0).any():  # whatever stands in an ignored row, its logits are finite
        hidden = torch.where((mass == 0)[:, None], 0.0, hidden)
    batch = Batch(hidden, labels, weights, mass)
    if request.sampled is None:
        return Part(batch, None)
    draw = request.sampled.candidates
    if isinstance(draw, SamplerSpec):
        draw = draw_candidates(draw, spec.num_classes, request.step, labels)
    folded = fold_repeats(
        draw.sampled, draw.sampled_expected_count.double().log().to(dtype), request.sampled.hit_removal
    )
    true_log_weight = torch.where(labels == PADDING, 0.0, -draw.true_expected_count.double().log().to(dtype))
    return Part(batch, Candidates(folded.class_ids, folded.log_weight, folded.log_weight_after_hit, true_log_weight))


def weights_of(labels: Tensor, given: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [N, T]: the given weights, or 1 / (number of labels) of each row; 0 on padding."""
    counted = labels != PADDING
    if given is not None:
        return torch.where(counted, given.to(dtype), 0.0)
    return counted.to(dtype) / counted.sum(1, keepdim=True).clamp(min=1).to(dtype)


def draw_candidates(spec: SamplerSpec, num_classes: int, step: int, labels: Tensor) -> SampledValues:
    """The candidates of a step with the expected counts of sampled [S] and labels [N, T] (1 on padding), float64."""
    values, _ = draw_with_tries(spec, num_classes, step, labels)
    return values


def draw_with_tries(spec: SamplerSpec, num_classes: int, step: int, labels: Tensor) -> tuple[SampledValues, int]:
    """`draw_candidates` and the number of tries it took."""
    distribution = sampler.DISTRIBUTIONS[spec.kind](num_classes)
    try:
        draw = sampler.draw(distribution, spec.num_sampled, spec.unique, spec.seed, step)
    except sampler.TriesExhausted:
        raise InvalidArgument(
            f"sampler.num_sampled = {spec.num_sampled} distinct ids of {num_classes} take more than "
            f"{sampler.max_tries(spec.num_sampled)} draws; sample with repeats, or use the full softmax",
            field="sampler.num_sampled",
        ) from None

    def count(class_ids: Tensor) -> Tensor:
        ids = class_ids.clamp(min=0).numpy()
        counts = sampler.expected_count(distribution, ids, spec.num_sampled, spec.unique, draw.num_tries)
        return torch.from_numpy(np.ascontiguousarray(counts))

    sampled = torch.from_numpy(draw.sampled)
    return SampledValues(sampled, count(labels), count(sampled)), draw.num_tries
