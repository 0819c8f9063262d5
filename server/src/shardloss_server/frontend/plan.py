"""Planning: from a valid request to a part that every shard can score. Pure: (request, spec, counts) -> part."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from shardloss import sampling
from shardloss.errors import InvalidArgument
from shardloss.sampling import Distribution
from torch import Tensor

from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.request import (
    InBatch,
    LossRequest,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
)
from shardloss_server.numerics.correction import fold_repeats, in_id_order, last_copies, row_hits
from shardloss_server.numerics.ranking import Best, beside, ordered
from shardloss_server.numerics.transform import Transform, normalized
from shardloss_server.shard.record import Batch, Candidates, Mined, Part, RowCandidates, TableSpec

PADDING = -1


def plan(request: LossRequest, spec: TableSpec, counts: ClassCounts) -> Part:
    """Return the part of a request: padding marked, weights filled in, candidates drawn and their repeats folded.

    Raises:
        InvalidArgument: a distinct draw would take too many tries, or a label cannot be drawn, so it has no log Q.
    """
    labels = request.labels
    if request.ignore_index is not None:
        labels = torch.where(labels == request.ignore_index, PADDING, labels)
    if is_multi_hot(request):
        labels = torch.where(last_copies(labels), labels, PADDING)
    batch = batch_of(request, labels, spec)
    weights = request.class_weights if request.objective.label_smoothing else None
    if request.sampled is None:
        return Part(batch, None, request.objective, weights)
    draw = drawn(request.sampled, labels, spec, request.step, counts)
    if draw.sampled.dim() == 2:
        return Part(batch, row_candidates(request.sampled, draw, labels, batch.mass.dtype), request.objective)
    return Part(batch, shared_candidates(request, draw, labels, batch.mass.dtype), request.objective)


# The batch


def unlabelled(request: LossRequest, spec: TableSpec, name: str) -> Part:
    """Return the part of a request whose labels are the named distribution, before any have arrived: mass is 0."""
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    hidden = transformed(request.hidden.to(dtype), request.objective.transform)
    none = torch.zeros(len(hidden), 0, dtype=dtype)
    batch = Batch(hidden, none.long(), none, torch.zeros(len(hidden), dtype=dtype))
    return Part(batch, None, request.objective, distribution=name)


def with_mass(part: Part, mass: Tensor) -> Part:
    """Return the part once all of its labels have arrived: mass [N] is the sum of each row's weights."""
    mass = mass.to(part.batch.mass.dtype)
    return replace(part, batch=replace(part.batch, hidden=counted_rows(part.batch.hidden, mass), mass=mass))


def counted_rows(hidden: Tensor, mass: Tensor) -> Tensor:
    """Return hidden [N, D] with 0 in ignored rows, so that their logits are finite whatever the request contains."""
    return hidden if mass.all() else torch.where((mass != 0)[:, None], hidden, 0.0)


def is_multi_hot(request: LossRequest) -> bool:
    """Return True for a full sigmoid without weights, in which a class counts once however often a row lists it."""
    return request.sampled is None and request.objective.family == "logistic" and request.label_weights is None


def batch_of(request: LossRequest, labels: Tensor, spec: TableSpec) -> Batch:
    """Return the batch of a request: transformed hidden, and the weights of labels and of all classes."""
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    weights = weights_of(request, labels, dtype)
    counts = weights.sum(1) != 0  # a class weight of 0 removes a row's label, but not the row's smoothing
    if request.class_weights is not None:
        weights = weights * request.class_weights.to(dtype)[labels.clamp(min=0)]
    spread, mass = None, weights.sum(1)
    if request.objective.label_smoothing:
        spread = counts.to(dtype) * (request.objective.label_smoothing / spec.num_classes)
        total = spec.num_classes if request.class_weights is None else request.class_weights.double().sum()
        weights = weights * (1.0 - request.objective.label_smoothing)
        mass = weights.sum(1) + spread * total
    hidden = counted_rows(request.hidden.to(dtype), mass)
    return Batch(transformed(hidden, request.objective.transform), labels, weights, mass, spread)


def weights_of(request: LossRequest, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y [N, T]: the given weights, or 1 / (number of labels) per row, or 1 in a full sigmoid; 0 on padding."""
    counted = labels != PADDING
    if request.label_weights is not None:
        return torch.where(counted, request.label_weights.to(dtype), 0.0)
    if request.objective.family == "logistic" and request.sampled is None:
        return counted.to(dtype)
    return counted.to(dtype) / counted.sum(1, keepdim=True).clamp(min=1).to(dtype)


def transformed(hidden: Tensor, transform: Transform) -> Tensor:
    """Return hidden [N, D], divided by its row norms if the transform normalizes, times the scale."""
    if transform.normalize:
        hidden, _ = normalized(hidden)
    return hidden if transform.scale == 1.0 else hidden * transform.scale


# The candidates


def shared_candidates(request: LossRequest, draw: SampledValues, labels: Tensor, dtype: torch.dtype) -> Candidates:
    """Return the candidates of the whole batch; repeats are not folded if each may count as a column of its own."""
    sampled = request.sampled
    assert sampled is not None
    log_count = log_counts(draw.sampled_expected_count, sampled).to(dtype)
    label_log_weight = label_log_weights(draw.true_expected_count, labels, sampled).to(dtype)
    hit_ids = sampled.hit_ids
    if request.objective.family == "softmax" and not sampled.num_hard_negatives and hit_ids is None:
        folded = fold_repeats(draw.sampled, log_count, sampled.hit_removal)
        return Candidates(folded.class_ids, folded.log_weight, folded.log_weight_after_hit, label_log_weight)
    counted = labels != PADDING
    of_labels = None if hit_ids is None else torch.where(counted, hit_ids.labels, PADDING)
    of_sampled = None
    if hit_ids is not None:
        of_sampled = hit_ids.labels[counted] if hit_ids.sampled is None else hit_ids.sampled
    columns, order = in_id_order(draw.sampled, log_count, sampled.hit_removal, of_sampled)
    return Candidates(
        columns.class_ids,
        columns.log_weight,
        columns.log_weight_after_hit,
        label_log_weight,
        None if of_sampled is None else of_sampled[order],
        of_labels,
    )


def row_candidates(sampled: SampledSoftmax, draw: SampledValues, labels: Tensor, dtype: torch.dtype) -> RowCandidates:
    """Return a separate set of candidates for each row; accidental hits have weight 0."""
    keys, label_keys = draw.sampled, labels
    if sampled.hit_ids is not None and sampled.hit_ids.sampled is not None:
        keys, label_keys = sampled.hit_ids.sampled, torch.where(labels == PADDING, PADDING, sampled.hit_ids.labels)
    hits = row_hits(keys, label_keys, sampled.hit_removal)
    log_weight = torch.where(hits, -torch.inf, -log_counts(draw.sampled_expected_count, sampled)).to(dtype)
    label_log_weight = label_log_weights(draw.true_expected_count, labels, sampled).to(dtype)
    return RowCandidates(draw.sampled, log_weight, label_log_weight)


def mined_part(part: Part, mined: list[Mined], k: int) -> Part:
    """Return the part with the k best candidates of each row over all shards."""
    assert part.candidates is not None
    found = reduce(beside, (Best(one.class_ids, one.logits, one.log_weight) for one in mined))
    best = ordered(found, k)
    return Part(
        part.batch, RowCandidates(best.class_ids, best.logits, part.candidates.label_log_weight), part.objective
    )


def log_counts(expected_count: Tensor, sampled: SampledSoftmax) -> Tensor:
    """Return log Q in float64, or 0 if logits are not corrected."""
    return expected_count.double().log() if sampled.is_corrected else torch.zeros(expected_count.shape).double()


def label_log_weights(expected_count: Tensor, labels: Tensor, sampled: SampledSoftmax) -> Tensor:
    """Return -log Q of the true columns [N, T], 0 on padding."""
    return torch.where(labels == PADDING, 0.0, -log_counts(expected_count, sampled))


# Draws


def drawn(sampled: SampledSoftmax, labels: Tensor, spec: TableSpec, step: int, counts: ClassCounts) -> SampledValues:
    """Return the candidates of a step with the expected counts of all columns (1 on padding), float64."""
    draw = sampled.candidates
    if isinstance(draw, SampledValues):
        return draw
    if isinstance(draw, SamplerSpec):
        values, _ = draw_with_tries(draw, spec.num_classes, step, labels, counts)
        if sampled.is_corrected:
            refuse_undrawable(values.true_expected_count, labels)
        return values
    ones = torch.ones(labels.shape, dtype=torch.float64)
    if isinstance(draw, PartialFc):
        ids = sampling.partial_fc(labels.flatten().numpy(), spec.num_classes, draw.num_sampled, draw.seed, step)
        return SampledValues(torch.from_numpy(ids), ones, torch.ones(len(ids), dtype=torch.float64))
    return in_batch(draw, labels, ones, counts)


def in_batch(draw: InBatch, labels: Tensor, ones: Tensor, counts: ClassCounts) -> SampledValues:
    """Return the counted labels of all rows; a row's own column was not drawn, so its logit is not corrected.

    A class with frequency p is expected (n - 1) p times among the n - 1 labels of the other rows. Source:
    arXiv:2507.09331, section 3.
    """
    ids = labels[labels != PADDING]
    if not draw.is_corrected:
        return SampledValues(ids, ones, torch.ones(len(ids), dtype=torch.float64))
    frequency = torch.from_numpy(counts.learned_frequency(ids.numpy()))
    return SampledValues(ids, ones, frequency * max(1, len(ids) - 1))


def draw_with_tries(
    spec: SamplerSpec, num_classes: int, step: int, labels: Tensor, counts: ClassCounts
) -> tuple[SampledValues, int]:
    """Return the draw of a sampler and the number of tries it took.

    Raises:
        InvalidArgument: too few classes can be drawn, or the draw takes too many tries.
    """
    with counts.unchanging(spec) as distribution:
        refuse_too_many(spec, distribution)
        try:
            draw = distribution_draw(distribution, spec, step)
        except sampling.TriesExhausted:
            raise InvalidArgument(
                f"sampler.num_sampled = {spec.num_sampled} distinct ids of {num_classes} take more than "
                f"{sampling.max_tries(spec.num_sampled)} draws; sample with repeats, or use the full softmax",
                field="sampler.num_sampled",
            ) from None

        def count(class_ids: Tensor) -> Tensor:
            ids = class_ids.clamp(min=0).numpy()
            if spec.kind == "all":
                return torch.ones(class_ids.shape, dtype=torch.float64)
            expected = sampling.expected_count(distribution, ids, spec.num_sampled, spec.unique, draw.num_tries)
            return torch.from_numpy(np.ascontiguousarray(expected))

        sampled = torch.from_numpy(draw.sampled)
        return SampledValues(sampled, count(labels), count(sampled)), draw.num_tries


def distribution_draw(distribution: Distribution, spec: SamplerSpec, step: int) -> sampling.Draw:
    """Return the draw of (seed, step), or all classes if the sampler's kind is "all"."""
    if spec.kind == "all":
        return sampling.all_candidates(distribution.num_classes)
    return sampling.draw(distribution, spec.num_sampled, spec.unique, spec.seed, step)


def refuse_too_many(spec: SamplerSpec, distribution: Distribution) -> None:
    """Refuse a distinct draw of more ids than there are classes with p > 0."""
    if spec.unique and spec.kind != "all" and spec.num_sampled > distribution.num_possible:
        raise InvalidArgument(
            f"sampler.num_sampled = {spec.num_sampled} distinct ids cannot come from {distribution.num_possible} "
            "classes with p > 0",
            field="sampler.num_sampled",
        )


def refuse_undrawable(true_expected_count: Tensor, labels: Tensor) -> None:
    """Refuse labels with Q = 0, whose corrected logit does not exist."""
    wrong = (true_expected_count <= 0) & (labels != PADDING)
    if wrong.any():
        n, t = (int(i) for i in torch.nonzero(wrong)[0])
        raise InvalidArgument(
            f"labels[{n}, {t}] = {int(labels[n, t])} is never drawn by this sampler: Q = 0 has no logarithm; give the "
            "class a count above 0",
            field="labels",
            index=f"{n}, {t}",
        )
