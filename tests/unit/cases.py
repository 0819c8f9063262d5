"""Every loss with every combination of options that the front end accepts, and the reference's answer to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from shardloss import sampling
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.request import (
    HitIds,
    InBatch,
    LossRequest,
    Mixture,
    PartialFc,
    SampledSoftmax,
    SampledValues,
    SamplerSpec,
)
from shardloss_server.numerics import reference
from shardloss_server.numerics.margin import Margin
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform
from torch import Tensor

from .front import request_of

V, D, N, S = 23, 5, 7, 11  # V is prime: seven shards have three or four rows; N and D are no multiple of a vector width
STEP = 4
RESERVED = 2  # classes that the unigram never draws, so none is a label
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
WRITTEN = torch.arange(1, V + 1, **DOUBLE) % 7 + 0.5  # class counts
SEEN = torch.arange(40) ** 2 % V  # labels that commits have seen

TRANSFORMS = {
    "plain": Transform(),
    "scaled": Transform(scale=1.7),
    "capped": Transform(soft_cap=2.5),
    "normalised": Transform(scale=6.0, normalize=True),
    "transformed": Transform(scale=6.0, soft_cap=4.0, normalize=True),
}
MARGINS = {"arcface": Margin(1.0, 0.5, 0.0), "cosface": Margin(1.0, 0.0, 0.35), "combined": Margin(1.2, 0.3, 0.1)}


@dataclass(frozen=True)
class Case:
    """A named request."""

    name: str
    request: LossRequest

    def __str__(self) -> str:
        return self.name


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, **DOUBLE)


def labels_of(num_true: int) -> Tensor:
    """Return labels [N, T] below 12, which most draws hit, with padding, an ignored row, and a label given twice."""
    labels = torch.randint(RESERVED, 12, (N, num_true))
    labels[5] = -1
    if num_true > 1:
        labels[1, 2] = labels[3, 0] = labels[3, 1] = -1
        labels[4, 2] = labels[4, 0]
    return labels


# Losses over all classes


def full_softmax_cases() -> Iterator[Case]:
    """Yield transform x smoothing x class weights x label weights x z-loss; smoothed labels have no soft cap."""
    class_weights = torch.rand(V, **DOUBLE) + 0.5
    labels = labels_of(3)
    class_weights[labels[0, 0]] = class_weights[labels[2]] = 0.0
    label_weights = torch.rand(N, 3, **DOUBLE) * 2
    label_weights[2, 1] = label_weights[6] = 0.0
    grid = product(TRANSFORMS.items(), (0.0, 0.1, 1.0), (None, class_weights), (None, label_weights), (0.0, 0.01))
    for (name, transform), smoothing, of_classes, of_labels, z_loss in grid:
        if smoothing and transform.soft_cap is not None:
            continue
        objective = Objective("softmax", transform, None, smoothing, z_loss)
        options = {"label_weights": of_labels, "class_weights": of_classes, "objective": objective}
        given = "".join([" classes" * (of_classes is not None), " labels" * (of_labels is not None)])
        yield Case(f"{name} smoothing {smoothing}{given} z {z_loss}", request_of(randn(N, D), labels, **options))


def margin_cases() -> Iterator[Case]:
    """Yield margin x z-loss over all classes, for a table without biases."""
    for (name, margin), z_loss in product(MARGINS.items(), (0.0, 0.01)):
        objective = Objective("softmax", TRANSFORMS["normalised"], margin, 0.0, z_loss)
        yield Case(f"{name} z {z_loss}", request_of(randn(N, D), labels_of(1), objective=objective))


def sigmoid_cases() -> Iterator[Case]:
    """Yield transform x label weights."""
    label_weights = torch.rand(N, 3, **DOUBLE) / 3  # a class given three times has a target of at most 1
    label_weights[6] = 0.0
    for (name, transform), of_labels in product(TRANSFORMS.items(), (None, label_weights)):
        options = {"label_weights": of_labels, "objective": Objective("logistic", transform)}
        given = " labels" * (of_labels is not None)
        yield Case(f"sigmoid {name}{given}", request_of(randn(N, D), labels_of(3), **options))


# Losses over candidates


def values(labels: Tensor, sampled: Tensor) -> SampledValues:
    """Return a draw whose Q, between 1e-2 and 3, differ even between copies of an id: it matters which copy stays."""
    counts = (10 ** torch.empty(shape, **DOUBLE).uniform_(-2, 0.5) for shape in (labels.shape, sampled.shape))
    return SampledValues(sampled, *counts)


def sampler(kind: str, num_sampled: int = S, unique: bool = True, **options: Any) -> SamplerSpec:
    return SamplerSpec(kind, num_sampled, unique, 3, **options)


MIXED = Mixture(SamplerSpec("fixed_unigram", 0, True, 0, 0.75), SamplerSpec("uniform", 0, True, 0), 0.6)
CANDIDATES = {
    "distinct values": lambda labels: values(labels, torch.randperm(V)[:S]),
    "repeated values": lambda labels: values(labels, torch.randint(0, 9, (S,))),
    "a row's own values": lambda labels: values(labels, torch.randint(0, 9, (N, S))),
    "no values": lambda labels: values(labels, torch.zeros(0, dtype=torch.int64)),
    "log_uniform": lambda labels: sampler("log_uniform"),
    "log_uniform with repeats": lambda labels: sampler("log_uniform", unique=False),
    "uniform": lambda labels: sampler("uniform"),
    "fixed_unigram": lambda labels: sampler("fixed_unigram", distortion=0.75, num_reserved_ids=RESERVED),
    "learned_unigram": lambda labels: sampler("learned_unigram"),
    "all": lambda labels: sampler("all", 0),
    "mixture": lambda labels: sampler("mixture", unique=False, mixture=MIXED),
    "in_batch": lambda labels: InBatch(False),
    "corrected in_batch": lambda labels: InBatch(True),
    "partial_fc": lambda labels: PartialFc(S, 3),
}
UNDER_EVERY_TRANSFORM = ("repeated values", "a row's own values")  # the kind of a draw does not matter once it is made
FAMILIES = {"softmax": ("softmax", 0, True), "3 hardest": ("softmax", 3, True), "nce": ("logistic", 0, True)}
FAMILIES["negative sampling"] = ("logistic", 0, False)


def sampled_cases(kind: str) -> Iterator[Case]:
    """Yield hit removal x hit ids x family x transform x z-loss for one kind of candidates."""
    takes_hit_ids = "values" in kind or kind == "in_batch"
    transforms = TRANSFORMS if kind in UNDER_EVERY_TRANSFORM else ("plain", "transformed")
    grid = product(("none", "every", "last"), (False, True)[: 1 + takes_hit_ids], FAMILIES, transforms, (0.0, 0.01))
    for place, (hit_removal, with_ids, family, transform, z_loss) in enumerate(grid):
        if with_ids and (hit_removal == "none" or ("in_batch" in kind and hit_removal == "last")):
            continue
        if hit_removal == "none" and "in_batch" in kind:
            continue  # in-batch candidates without the row's own label are "last"
        name, num_hard, is_corrected = FAMILIES[family]
        if (name == "logistic" and z_loss) or (num_hard and "row's own" in kind):
            continue
        num_true = 1 if "in_batch" in kind or place % 4 == 0 else 3
        labels = labels_of(num_true)
        draw = CANDIDATES[kind](labels)
        ids = hit_ids_of(labels, draw) if with_ids else None
        sampled = SampledSoftmax(draw, hit_removal, ids, num_hard, is_corrected)
        objective = Objective(name, TRANSFORMS[transform], None, 0.0, z_loss)
        options = {"sampled": sampled, "objective": objective, "step": STEP}
        about = f"{kind} {family} {hit_removal}{' ids' * with_ids} {transform} z {z_loss}"
        yield Case(about, request_of(randn(N, D), labels, **options))


def sampled_margin_cases(kind: str) -> Iterator[Case]:
    """Yield margin x hard negatives x z-loss for one kind of candidates and a table without biases."""
    for (name, margin), num_hard, z_loss in product(MARGINS.items(), (0, 3), (0.0, 0.01)):
        if num_hard and "row's own" in kind:
            continue
        labels = labels_of(1)
        sampled = SampledSoftmax(CANDIDATES[kind](labels), "every", None, num_hard)
        objective = Objective("softmax", TRANSFORMS["normalised"], margin, 0.0, z_loss)
        options = {"sampled": sampled, "objective": objective, "step": STEP}
        yield Case(f"{kind} {name} hardest {num_hard} z {z_loss}", request_of(randn(N, D), labels, **options))


def hit_ids_of(labels: Tensor, draw: Any) -> HitIds:
    """Return hit ids by which two adjacent classes are one item; the first row's labels belong to no pair."""
    of_labels = labels.clamp(min=0) // 2
    of_labels[0] = 40
    if isinstance(draw, InBatch):
        return HitIds(of_labels, None)
    return HitIds(of_labels, draw.sampled // 2)


# The reference's answers


@dataclass(frozen=True)
class Expected:
    """Losses [N], their gradients in hidden [N, D] and scale [N], and d sum(g loss) / d weights [V, D], biases [V]."""

    loss: Tensor
    hidden_grad: Tensor
    scale_grad: Tensor
    weights_grad: Tensor
    biases_grad: Tensor


def expected(weights: Tensor, biases: Tensor, request: LossRequest, counts: ClassCounts, g: Tensor) -> Expected:
    """Return the reference's losses and their gradients by autograd."""
    weights, biases, hidden = (x.detach().clone().requires_grad_() for x in (weights, biases, request.hidden))
    scale = torch.full((len(hidden), 1), request.objective.transform.scale, dtype=weights.dtype, requires_grad=True)
    loss = losses(weights, biases, hidden, scale, request, counts)
    inputs = (hidden, scale, weights, biases)
    grads = torch.autograd.grad(loss.sum(), inputs[:2], retain_graph=True, materialize_grads=True)
    table = torch.autograd.grad((g.to(loss.dtype) * loss).sum(), inputs[2:], materialize_grads=True)
    return Expected(loss.detach(), grads[0], grads[1][:, 0], *table)


def losses(
    weights: Tensor, biases: Tensor, hidden: Tensor, scale: Tensor, request: LossRequest, counts: ClassCounts
) -> Tensor:
    """Return differentiable per-example losses [N] of a request; scale [N, 1] has one value per row."""
    objective, labels = request.objective, request.labels
    transform = objective.transform
    logits = reference.logits_of(weights, biases, hidden, scale, transform.soft_cap, transform.normalize)
    if request.sampled is not None:
        draws = draws_of(request, weights.shape[0], counts)
        each = [row_loss(z, draw, s[0], request) for z, draw, s in zip(logits, draws, scale, strict=True)]
        return torch.stack(each)
    label_weights = weights_of(request).to(weights.dtype)
    if objective.family == "logistic":
        return reference.sigmoid_loss(logits, labels, label_weights)
    if objective.margin is not None:
        true = logits.gather(1, labels.clamp(min=0))
        logits = logits.scatter(1, labels.clamp(min=0), reference.with_margin(true, objective.margin, scale))
    class_weights = None if request.class_weights is None else request.class_weights.to(weights.dtype)
    return reference.softmax_loss(
        logits, labels, label_weights, objective.label_smoothing, class_weights, objective.z_loss
    )


def weights_of(request: LossRequest) -> Tensor:
    """Return y [N, T]: given, or uniform over a row's labels in a softmax, or 1 in a sigmoid loss; 0 on padding."""
    counted = request.labels >= 0
    if request.label_weights is not None:
        return torch.where(counted, request.label_weights, 0.0)
    if request.objective.family == "logistic":  # a class counts where its row lists it first
        rows = request.labels.tolist()
        return torch.tensor([[float(y >= 0 and y not in row[:t]) for t, y in enumerate(row)] for row in rows])
    return counted.double() / counted.sum(1, keepdim=True).clamp(min=1)


def row_loss(logits: Tensor, draw: reference.Draw, scale: Tensor, request: LossRequest) -> Tensor:
    """Return the loss [] of one row of a sampled loss."""
    assert request.sampled is not None
    objective = request.objective
    if len(draw.labels) == 0:
        return torch.zeros((), dtype=logits.dtype)
    logs = (draw.label_log_q.to(logits.dtype), draw.sampled_log_q.to(logits.dtype))
    draw = replace(draw, label_log_q=logs[0], sampled_log_q=logs[1])
    columns = reference.columns(logits, draw, objective.margin, scale, request.sampled.num_hard_negatives)
    if objective.family == "logistic":
        return reference.sampled_logistic_loss(*columns)
    return reference.sampled_softmax_loss(*columns, objective.z_loss)


def draws_of(request: LossRequest, num_classes: int, counts: ClassCounts) -> Iterator[reference.Draw]:
    """Yield the draw of each row of a request."""
    sampled, labels = request.sampled, request.labels
    assert sampled is not None
    for n, own in enumerate(labels):
        is_label = own >= 0
        ids, count, own_count = drawn_by_row(request, n, num_classes, counts)
        keys, own_keys = ids, own
        hit_removal = sampled.hit_removal
        if isinstance(sampled.candidates, InBatch):
            other = (torch.arange(len(labels)) != n) & (labels[:, 0] >= 0)
            hit_removal = "none" if hit_removal == "last" else hit_removal
        if sampled.hit_ids is not None:
            given = sampled.hit_ids.sampled
            own_keys = sampled.hit_ids.labels[n]
            keys = sampled.hit_ids.labels[other, 0] if given is None else given[n] if given.dim() == 2 else given
        logs = (own_count.double().log()[is_label], count.double().log())
        if not sampled.is_corrected:
            logs = tuple(torch.zeros_like(log) for log in logs)
        yield reference.Draw(own[is_label], ids, *logs, own_keys[is_label], keys, hit_removal)


def drawn_by_row(request: LossRequest, n: int, num_classes: int, counts: ClassCounts) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids [S] that row n draws, their Q [S], and Q [T] of the row's labels (arbitrary on padding)."""
    assert request.sampled is not None
    draw, labels = request.sampled.candidates, request.labels
    ones = torch.ones(labels.shape[1], **DOUBLE)
    if isinstance(draw, SampledValues):
        has_own = draw.sampled.dim() == 2
        ids, count = (x[n] if has_own else x for x in (draw.sampled, draw.sampled_expected_count))
        return ids, count, draw.true_expected_count[n]
    if isinstance(draw, InBatch):
        counted = labels[:, 0] >= 0
        ids = labels[counted & (torch.arange(len(labels)) != n), 0]
        count = probabilities(sampler("learned_unigram"), num_classes)[ids] * max(1, int(counted.sum()) - 1)
        return ids, count if draw.is_corrected else torch.ones_like(count), ones
    if isinstance(draw, PartialFc):
        drawn = sampling.partial_fc(labels.numpy(), num_classes, draw.num_sampled, draw.seed, request.step)
        ids = torch.from_numpy(drawn)
        return ids, torch.ones(len(ids), **DOUBLE), ones
    if draw.kind == "all":
        return torch.arange(num_classes), torch.ones(num_classes, **DOUBLE), ones
    made = sampling.draw(counts.distribution(draw), draw.num_sampled, draw.unique, draw.seed, request.step)
    p = probabilities(draw, num_classes)
    count = p * draw.num_sampled
    if draw.unique and made.num_tries > draw.num_sampled:
        count = 1.0 - (1.0 - p) ** made.num_tries
    ids = torch.from_numpy(made.sampled)
    return ids, count[ids], count[labels[n]]


def probabilities(draw: SamplerSpec, num_classes: int) -> Tensor:
    """Return p [V] by its formula, from the counts above."""
    ids = torch.arange(num_classes, **DOUBLE)
    if draw.kind == "uniform":
        return torch.full((num_classes,), 1.0 / num_classes, **DOUBLE)
    if draw.kind == "log_uniform":
        return torch.log((ids + 2) / (ids + 1)) / torch.log(torch.tensor(num_classes + 1.0, **DOUBLE))
    if draw.kind == "mixture":
        assert draw.mixture is not None
        first, second = (probabilities(one, num_classes) for one in (draw.mixture.first, draw.mixture.second))
        return draw.mixture.share * first + (1 - draw.mixture.share) * second
    if draw.kind == "learned_unigram":
        weights = 1.0 + torch.bincount(SEEN, minlength=num_classes).double()
    else:
        weights = torch.where(ids < draw.num_reserved_ids, 0.0, WRITTEN**draw.distortion)
    return weights / weights.sum()


def finer(request: LossRequest, learned_scale: bool, g: Tensor) -> LossRequest:
    """Return the request with an upstream gradient, which the gradient of a learned scale requires."""
    return replace(request, upstream=g, objective=replace(request.objective, learned_scale=learned_scale))


def assert_close(actual: Tensor | None, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Assert equality to within a tolerance of the largest magnitude."""
    assert actual is not None
    atol = tolerance * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=atol, msg=lambda text: f"{what}\n{text}")
