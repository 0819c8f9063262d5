"""Losses at the edges: huge logits, one class, no rows, no candidates, cosines of 1, rows of zeros, and rounding."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from shardloss.errors import InvalidArgument
from shardloss_server.frontend.request import LossReply, LossRequest, PartialFc, SampledSoftmax, SampledValues, Want
from shardloss_server.numerics.margin import Margin
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.kept import KEPT_BYTES
from torch import Tensor

from ..cases import (
    CANDIDATES,
    MARGINS,
    SEEN,
    WRITTEN,
    Case,
    D,
    N,
    V,
    assert_close,
    expected,
    finer,
    full_softmax_cases,
    margin_cases,
    randn,
    sampled_cases,
    sampled_margin_cases,
    sigmoid_cases,
    values,
)
from ..front import Front, Table, request_of

LOSSES: dict[str, Callable[[], Any]] = {
    "full softmax": full_softmax_cases,
    "sigmoid": sigmoid_cases,
    "margins": margin_cases,
    "shared candidates": lambda: sampled_cases("repeated values"),
    "a row's own candidates": lambda: sampled_cases("a row's own values"),
    "in_batch": lambda: sampled_cases("in_batch"),
    "partial_fc": lambda: sampled_cases("partial_fc"),
    "margins over candidates": lambda: sampled_margin_cases("distinct values"),
}
CERTAIN = 1e-14  # a loss of 0, to rounding
every_loss = pytest.mark.parametrize("loss", LOSSES)


def some(loss: str, step: int) -> list[Case]:
    return list(LOSSES[loss]())[::step]


def table_of(front: Front, weights: Tensor, biases: Tensor | None, **options: Any) -> Table:
    table = front.table(weights, biases, **({"num_shards": 3, "strategy": "mod", "count_labels": True} | options))
    if table.spec.num_classes == V:
        table.owner.counts.write(0, WRITTEN.numpy())
        table.owner.counts.learn(SEEN.numpy())
    return table


def compare(table: Table, request: LossRequest, tolerance: float = 1e-10, slopes: float | None = None) -> LossReply:
    """Assert that the answer equals the reference and return it; slopes is the tolerance of gradients."""
    (weights, biases), g = table.read(), randn(len(request.hidden))
    slopes = tolerance if slopes is None else slopes
    wanted = expected(weights, biases, request, table.owner.counts, g)
    reply = table.loss(finer(request, True, g))
    weights_grad, biases_grad = table.dense(reply.table_grad)
    assert_close(reply.loss, wanted.loss, "loss", tolerance)
    assert_close(reply.hidden_grad, wanted.hidden_grad, "hidden", slopes)
    assert_close(reply.scale_grad, wanted.scale_grad, "scale", slopes)
    assert_close(weights_grad, wanted.weights_grad, "weights", slopes)
    if table.spec.bias:
        assert_close(biases_grad, wanted.biases_grad, "biases", slopes)
    return reply


def learns_nothing(table: Table, request: LossRequest) -> bool:
    """Return True if losses and every gradient are 0 and a commit leaves every bit of the table."""
    reply = table.loss(finer(request, True, randn(len(request.hidden))))
    before = table.read()
    table.commit(1, [(table.open(request, 1), torch.ones(len(request.hidden)))], 0.3)
    numbers = [reply.loss, reply.hidden_grad, reply.scale_grad, reply.table_grad.rows, reply.table_grad.biases]
    same = all(torch.equal(a, b) for a, b in zip(before, table.read(), strict=True))
    return same and not any(x.any() for x in numbers)


# Large numbers


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_smoothed_labels_are_the_same_on_one_shard_and_two(front: Front, dtype: str) -> None:
    """With logits x 1000, losses are differences of thousands; the sum of all logits is split over the shards."""
    weights, biases = 1000 * randn(V, D), 1000 * randn(V)
    tables = [table_of(front, weights, biases, num_shards=k, dtype=dtype) for k in (1, 2)]
    labels = torch.randint(0, V, (N, 1))
    for smoothing in (0.1, 1.0):
        request = request_of(randn(N, D), labels, objective=Objective(label_smoothing=smoothing))
        one, two = (table.loss(request) for table in tables)
        rtol = 1e-12 if dtype == "float64" else 1e-5
        torch.testing.assert_close(one.loss, two.loss, rtol=rtol, atol=0)
        torch.testing.assert_close(one.hidden_grad, two.hidden_grad, rtol=rtol, atol=rtol * 1000)


@every_loss
def test_logits_of_ten_thousand(front: Front, loss: str) -> None:
    """Losses and gradients far outside the range of exp equal the reference; logits there are right to 1e-12."""
    bias = "margins" not in loss
    table = table_of(front, 3000 * randn(V, D), 3000 * randn(V) if bias else None)
    for case in some(loss, 5):
        reply = compare(table, case.request, 1e-10, 1e-8)
        assert torch.isfinite(reply.loss).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_soft_cap_holds_huge_logits(front: Front, dtype: str) -> None:
    """Logits of 1e35 become +-cap with gradient 0; if they overflow, +-inf is capped and inf - inf is refused."""
    weights = torch.full((V, D), 1e35).double()
    weights[::2] *= -1
    table = table_of(front, weights, torch.zeros(V), dtype=dtype)
    hidden, labels = torch.ones(N, D).double(), torch.arange(N)[:, None]
    request = request_of(hidden, labels, objective=Objective(transform=Transform(soft_cap=3.0)))
    reply = table.loss(request)
    capped = torch.where(torch.arange(V) % 2 == 0, -3.0, 3.0).double()
    wanted = capped.logsumexp(0) - capped[labels[:, 0]]
    torch.testing.assert_close(reply.loss.double(), wanted, rtol=1e-6, atol=0)
    assert not reply.hidden_grad.any()
    assert not reply.table_grad.rows.any()
    if dtype == "float32":
        far = table.loss(replace(request, hidden=1e5 * hidden))
        torch.testing.assert_close(far.loss.double(), wanted, rtol=1e-6, atol=0)
        with pytest.raises(InvalidArgument) as refused:
            table.loss(replace(request, hidden=1e5 * hidden * torch.tensor([1, -1, 1, -1, 0.5])))
        assert (refused.value.field, refused.value.index) == ("hidden", "0")


@pytest.mark.parametrize("num_hard", [0, 3])
def test_logits_that_overflow_are_refused_by_name(front: Front, num_hard: int) -> None:
    """Candidates cannot be ranked by inf - inf, so the error names the first row that has it."""
    table = table_of(front, torch.full((V, D), 1e37), None, dtype="float32")
    hidden = torch.ones(N, D)
    hidden[4] = torch.tensor([100.0, -100.0, 100.0, -100.0, 1.0])
    labels = torch.randint(0, V, (N, 1))
    sampled = SampledSoftmax(values(labels, torch.arange(11)), "every", None, num_hard)
    with pytest.raises(InvalidArgument) as refused:
        table.loss(request_of(hidden, labels, sampled=sampled))
    assert (refused.value.field, refused.value.index) == ("hidden", "4")


OVERFLOWS = {
    "hidden": (True, 1e30, 1e10, Objective()),
    "z-loss": (True, 1.0, 1e4, Objective(z_loss=1e36)),
    "scale": (True, 1.0, 1e4, Objective(transform=Transform(1e38))),
    "the norm of a row of zeros": (True, 1.0, 1e10, Objective(transform=Transform(1e20, None, True))),
    "a steep margin": (
        False,
        1.0,
        1.0,
        Objective(transform=Transform(16.0, None, True), margin=Margin(1e38, 0.0, 0.0)),
    ),
    "the learning rate": (True, 1e10, 1e10, Objective()),
}


@pytest.mark.parametrize("what", OVERFLOWS)
def test_a_step_whose_gradient_would_overflow_is_refused(front: Front, what: str) -> None:
    """If finite numbers have a product that overflows float32, the error names g and no bit of the table changes."""
    bias, size, g, objective = OVERFLOWS[what]
    table = table_of(front, torch.zeros(V, D), torch.zeros(V) if bias else None, dtype="float32")
    request = request_of(size * torch.ones(N, D), torch.arange(N)[:, None], objective=objective)
    ticket = table.open(request, 1)
    with pytest.raises(InvalidArgument) as refused:
        table.commit(1, [(ticket, torch.full((N,), g))], 1e30 if what == "the learning rate" else 0.1)
    assert (refused.value.field, refused.value.index) == ("parts[0].g", "0")
    assert not table.read()[0].any()
    table.commit(1, [(ticket, torch.zeros(N))], 0.1)
    assert not table.read()[0].any()


# Few rows, classes or candidates


@every_loss
def test_a_batch_whose_rows_are_all_ignored_costs_nothing(front: Front, loss: str) -> None:
    """Losses and gradients are 0, not nan, and the table is unchanged, whatever hidden contains."""
    bias = "margins" not in loss
    for case in some(loss, 7):
        table = table_of(front, randn(V, D), randn(V) if bias else None)
        labels = torch.full_like(case.request.labels, -1)
        assert learns_nothing(table, replace(case.request, labels=labels, hidden=1e300 * randn(N, D))), str(case)


@every_loss
def test_a_batch_without_rows_is_legal(front: Front, loss: str) -> None:
    """N = 0 gives no losses and no gradients, and changes no row."""
    bias = "margins" not in loss
    for case in some(loss, 7):
        table = table_of(front, randn(V, D), randn(V) if bias else None)
        assert learns_nothing(table, without_rows(case.request)), str(case)


def without_rows(request: LossRequest) -> LossRequest:
    """Return the request with N = 0."""
    sampled = request.sampled
    if sampled is not None and isinstance(sampled.candidates, SampledValues):
        draw = sampled.candidates
        own = draw.sampled.dim() == 2
        ids, count = (x[:0] if own else x for x in (draw.sampled, draw.sampled_expected_count))
        sampled = replace(sampled, candidates=SampledValues(ids, draw.true_expected_count[:0], count))
    if sampled is not None and sampled.hit_ids is not None:
        ids = sampled.hit_ids
        of_sampled = ids.sampled[:0] if ids.sampled is not None and ids.sampled.dim() == 2 else ids.sampled
        sampled = replace(sampled, hit_ids=replace(ids, labels=ids.labels[:0], sampled=of_sampled))
    label_weights = None if request.label_weights is None else request.label_weights[:0]
    return replace(
        request, hidden=request.hidden[:0], labels=request.labels[:0], label_weights=label_weights, sampled=sampled
    )


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_table_of_one_class(front: Front, num_shards: int) -> None:
    """A softmax over one class has loss 0; with z-loss, margins or sigmoids the loss equals the reference."""
    weights, biases, labels = randn(1, D), randn(1), torch.zeros(N, 1, dtype=torch.int64)
    table = table_of(front, weights, biases, num_shards=num_shards)
    assert compare(table, request_of(randn(N, D), labels)).loss.abs().max() < CERTAIN
    for objective in (
        Objective(label_smoothing=0.1, z_loss=0.01),
        Objective("logistic", Transform(scale=2.0, soft_cap=3.0)),
        Objective(transform=Transform(normalize=True), z_loss=0.1),
    ):
        compare(table, request_of(randn(N, D), labels, objective=objective))
    for kind in ("log_uniform with repeats", "all", "in_batch", "no values"):
        sampled = SampledSoftmax(CANDIDATES[kind](labels), "every")
        assert compare(table, request_of(randn(N, D), labels, sampled=sampled)).loss.abs().max() < CERTAIN
    sampled = SampledSoftmax(PartialFc(1, 0), "every")
    compare(table, request_of(randn(N, D), labels, sampled=sampled, objective=Objective("logistic")))
    unbiased = table_of(front, weights, None, num_shards=num_shards)
    objective = Objective(transform=Transform(4.0, None, True), margin=Margin(1.0, 0.5, 0.1))
    reply = compare(unbiased, request_of(randn(N, D), labels, objective=objective))
    assert reply.loss.abs().max() < CERTAIN


@every_loss
def test_all_labels_on_one_shard(front: Front, loss: str) -> None:
    """The other shards own no label and contribute nothing to the merged target."""
    bias = "margins" not in loss
    table = table_of(front, randn(V, D), randn(V) if bias else None, num_shards=7, strategy="div")
    for case in some(loss, 7):
        labels = torch.where(case.request.labels < 0, -1, 5 + case.request.labels % 3)  # shard 1 has classes 4 to 7
        compare(table, replace(case.request, labels=labels))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", ["softmax", "logistic"])
@pytest.mark.parametrize("num_hard", [0, 2])
def test_candidates_that_are_all_hits(front: Front, own: bool, family: str, num_hard: int) -> None:
    """A softmax has loss 0, as one column is left; a logistic loss is that of the true columns."""
    if num_hard and (own or family == "logistic"):
        return
    table = table_of(front, randn(V, D), randn(V))
    labels = torch.full((N, 1), 7)
    draw = values(labels, torch.full((N, 4) if own else (4,), 7))
    sampled = SampledSoftmax(draw, "every", None, num_hard)
    reply = compare(table, request_of(randn(N, D), labels, sampled=sampled, objective=Objective(family)))
    assert family == "logistic" or reply.loss.abs().max() < CERTAIN


# Cosines


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", [*MARGINS, "sphereface"])
def test_cosines_of_one_have_finite_margins(front: Front, name: str, sign: float, dtype: str) -> None:
    """If hidden is +-row, losses equal the formula and gradients are small: the cosine has no slope along the row."""
    margin = MARGINS.get(name, Margin(1.35, 0.0, 0.0))
    weights = randn(V, D)
    table = table_of(front, weights, None, dtype=dtype)
    labels = torch.arange(N)[:, None]
    objective = Objective(transform=Transform(16.0, None, True), margin=margin)
    request = request_of(sign * 3.7 * weights[:N], labels, objective=objective)
    wanted = expected(weights, torch.zeros(V).double(), request, table.owner.counts, torch.ones(N).double())
    reply = table.loss(finer(request, True, torch.ones(N)))
    tolerance = 1e-6 if dtype == "float64" else 3e-3  # acos turns a rounding error into its square root
    torch.testing.assert_close(reply.loss.double(), wanted.loss, rtol=tolerance, atol=tolerance)
    for gradient in (reply.hidden_grad, reply.table_grad.rows, reply.scale_grad):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 100


@pytest.mark.parametrize("loss", ["full softmax", "sigmoid", "shared candidates", "a row's own candidates"])
def test_rows_and_hidden_of_zeros_have_cosine_zero(front: Front, loss: str) -> None:
    """Zeros are normalised as by torch.nn.functional.normalize, with the gradient of v / 1e-12."""
    weights = randn(V, D)
    weights[[3, 8, 22]] = 0.0
    weights[9] *= 2e-13  # shorter than the bound, but not 0
    table = table_of(front, weights, randn(V))
    for case in [c for c in some(loss, 1) if c.request.objective.transform.normalize][::5]:
        hidden = randn(N, D)
        hidden[2] = 0.0
        hidden[3] *= 1e-13
        compare(table, replace(case.request, hidden=hidden))


def test_a_norm_that_overflows_does_not_show(front: Front) -> None:
    """Hidden and rows of float32's largest numbers have the cosines of their directions."""
    weights = randn(V, D).sign() * 3e38
    table = table_of(front, weights, torch.zeros(V), dtype="float32")
    request = request_of(randn(N, D).sign().float() * 3e38, torch.arange(N)[:, None])
    request = replace(request, objective=Objective(transform=Transform(8.0, None, True)))
    wanted = expected(weights.sign(), torch.zeros(V).double(), plain(request), table.owner.counts, torch.ones(N))
    torch.testing.assert_close(table.loss(request).loss.double(), wanted.loss, rtol=1e-5, atol=1e-5)


def plain(request: LossRequest) -> LossRequest:
    return replace(request, hidden=request.hidden.sign().double())


# Rounding


@every_loss
def test_float32_is_about_as_exact_as_the_naive_float32(front: Front, loss: str) -> None:
    """Root mean square errors against float64 are at most twice those of the reference in float32 (with autograd)."""
    bias = "margins" not in loss
    ours, naive = (dict.fromkeys(("loss", "hidden", "scale", "weights"), 0.0) for _ in range(2))
    for case in some(loss, 3):
        weights, biases, g = randn(V, D).float(), randn(V).float() * bias, torch.randn(N)
        table = table_of(front, weights, biases if bias else None, dtype="float32")
        request = replace(case.request, hidden=case.request.hidden.float())
        counts = table.owner.counts
        doubles = replace(request, hidden=request.hidden.double())
        exact = expected(weights.double(), biases.double(), doubles, counts, g.double())
        simple = expected(weights, biases, request, counts, g)
        reply = table.loss(finer(request, True, g))
        served = (reply.loss, reply.hidden_grad, reply.scale_grad, table.dense(reply.table_grad)[0])
        answers = (simple.loss, simple.hidden_grad, simple.scale_grad, simple.weights_grad)
        truths = (exact.loss, exact.hidden_grad, exact.scale_grad, exact.weights_grad)
        for name, mine, other, truth in zip(ours, served, answers, truths, strict=True):
            ours[name] += float((mine.double() - truth).square().sum())
            naive[name] += float((other.double() - truth).square().sum())
    ratios = {name: math.sqrt(ours[name] / naive[name]) for name in ours}
    assert max(ratios.values()) <= 2, ratios


# Size


@pytest.mark.slow
def test_more_logits_than_32_bits_count(front: Front) -> None:
    """4097 rows x 2^20 classes give right losses and gradients in little memory beyond what workers may keep."""
    num_classes, num_rows = 1 << 20, 4097
    biases = torch.linspace(-1, 1, num_classes)
    table = front.table(torch.zeros(num_classes, 2), biases, num_shards=2, dtype="float32")
    labels = torch.arange(num_rows)[:, None] * 255
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    reply = table.loss(request_of(torch.ones(num_rows, 2), labels, want=Want(lse=True, hidden_grad=True)))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    wanted = biases.double().logsumexp(0) - biases[labels[:, 0]].double()
    torch.testing.assert_close(reply.loss.double(), wanted, rtol=1e-6, atol=0)
    assert not reply.hidden_grad.any()
    assert grown_mib < 200 + 2 * KEPT_BYTES / 2**20, grown_mib  # N x V float32 would be 16 GiB
    assert time.monotonic() - began < 300
