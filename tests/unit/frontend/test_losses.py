"""Every loss under every combination of options equals the reference, with its gradients, for any sharding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from shardloss_server.numerics import reference
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.transform import Transform
from torch import Tensor
from torch.nn import functional

from ...extent import EVERYTHING, sample
from ..cases import (
    CANDIDATES,
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
)
from ..front import Front, Table, request_of

CUTS = [(1, "div"), (7, "mod"), (2, "mod"), (3, "div"), (3, "mod"), (7, "div"), (2, "div")]


@dataclass(frozen=True)
class Cuts:
    """One table, sharded in every way."""

    weights: Tensor
    biases: Tensor
    tables: list[Table]

    def check(self, cases: Iterable[Case]) -> int:
        """Check every case on two of the cuts, one with a learned scale, one without; return the number of cases.

        The two cuts rotate, so each cut checks a quarter of the cases. A full run checks every case on all of them.
        """
        num_cases = 0
        for place, case in enumerate(cases):
            g = randn(N)
            wanted = expected(self.weights, self.biases, case.request, self.tables[0].owner.counts, g)
            for i, table in enumerate(sample(self.tables, 2, place)):
                with_scale = (i + place) % 2 == 0
                reply = table.loss(finer(case.request, with_scale, g))
                weights_grad, biases_grad = table.dense(reply.table_grad)
                where = f"{case} of {table.spec.placement}"
                assert_close(reply.loss, wanted.loss, f"loss: {where}")
                assert_close(reply.hidden_grad, wanted.hidden_grad, f"hidden: {where}")
                assert_close(weights_grad, wanted.weights_grad, f"weights: {where}")
                if table.spec.bias:
                    assert_close(biases_grad, wanted.biases_grad, f"biases: {where}")
                if with_scale:
                    assert_close(reply.scale_grad, wanted.scale_grad, f"scale: {where}")
            num_cases += 1
        return num_cases


def cut(front: Front, bias: bool) -> Cuts:
    weights, biases = 0.7 * randn(V, D), randn(V) if bias else torch.zeros(V).double()
    given = biases if bias else None
    tables = [
        front.table(weights, given, num_shards=num_shards, strategy=strategy, count_labels=True)
        for num_shards, strategy in CUTS
    ]
    for table in tables:
        table.owner.counts.write(0, WRITTEN.numpy())
        table.owner.counts.learn(SEEN.numpy())
    return Cuts(weights, biases, tables)


@pytest.fixture(scope="module")
def biased(front: Front) -> Cuts:
    return cut(front, True)


@pytest.fixture(scope="module")
def unbiased(front: Front) -> Cuts:
    return cut(front, False)


def test_full_softmax(biased: Cuts) -> None:
    """Transform, smoothing, class weights, label weights and z-loss are right in every combination."""
    assert biased.check(full_softmax_cases()) == 88


def test_margins(unbiased: Cuts) -> None:
    """ArcFace, CosFace and the combined margin over all classes equal the reference."""
    assert unbiased.check(margin_cases()) == 6


def test_full_sigmoid(biased: Cuts) -> None:
    """Several labels per row, weighted or not, are right under every transform."""
    assert biased.check(sigmoid_cases()) == 10


@pytest.mark.parametrize("kind", CANDIDATES)
def test_sampled_losses(biased: Cuts, kind: str) -> None:
    """Hit removal, hit ids, family, transform and z-loss are right for one kind of candidates.

    A full run checks every combination, any other run every second one: the odd ones of one kind, the even ones of the
    next.
    """
    first = list(CANDIDATES).index(kind) % 3
    cases = sampled_cases(kind) if EVERYTHING else islice(sampled_cases(kind), first, None, 3)
    assert biased.check(cases) >= 6


@pytest.mark.parametrize("kind", CANDIDATES)
def test_margins_over_candidates(unbiased: Cuts, kind: str) -> None:
    """Only the true column has the margin."""
    assert unbiased.check(sampled_margin_cases(kind)) >= 6


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_a_unit_mass_has_the_gradients_of_softmax_minus_weights(biased: Cuts, z_loss: float) -> None:
    """Gradients of hidden, rows, biases and scale are right for any sum of a row's weights; the loss is unchanged.

    An ignored row has loss and gradients of 0.
    """
    labels, weights, g = torch.randint(0, V, (N, 2)), 3.0 * torch.rand(N, 2).double(), randn(N)
    labels[2], weights[2] = -1, 0.0
    objective = Objective(transform=Transform(1.7), z_loss=z_loss, learned_scale=True, unit_mass_gradient=True)
    request = request_of(randn(N, D), labels, label_weights=weights, objective=objective, upstream=g)
    loss = expected(biased.weights, biased.biases, request, biased.tables[0].owner.counts, g).loss
    inputs = (request.hidden, torch.full((N, 1), 1.7, dtype=torch.float64), biased.weights, biased.biases)
    hidden, scale, rows, biases = (x.clone().requires_grad_() for x in inputs)
    logits = reference.logits_of(rows, biases, hidden, scale)
    lse, of_labels = logits.logsumexp(1), (weights * logits.gather(1, labels.clamp(min=0))).sum(1)
    sloped = torch.where(weights.sum(1) == 0, 0.0, lse + z_loss * lse * lse - of_labels)
    own = torch.autograd.grad(sloped.sum(), (hidden, scale), retain_graph=True)
    of_table = torch.autograd.grad((g * sloped).sum(), (rows, biases))
    for table in biased.tables:
        reply = table.loss(request)
        weights_grad, biases_grad = table.dense(reply.table_grad)
        assert_close(reply.loss, loss, "loss")
        assert_close(reply.hidden_grad, own[0], "hidden")
        assert_close(reply.scale_grad, own[1][:, 0], "scale")
        assert_close(weights_grad, of_table[0], "weights")
        assert_close(biases_grad, of_table[1], "biases")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("with_class_weights", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_the_reference_is_torch_cross_entropy(
    label_smoothing: float, with_class_weights: bool, with_weights: bool
) -> None:
    """Both agree for one label per row and for weights that sum to 1; torch ignores a row by its label only."""
    logits = randn(N, V)
    class_weights = torch.rand(V).double() if with_class_weights else None
    if class_weights is not None:
        class_weights[3] = 0.0
    options = {"weight": class_weights, "label_smoothing": label_smoothing, "reduction": "none"}
    if with_weights:
        labels, weights = torch.arange(V).expand(N, V), torch.rand(N, V).double()
        wanted = functional.cross_entropy(logits, weights, **options)
    else:
        labels, weights = torch.randint(0, V, (N, 1)), torch.ones(N, 1).double()
        labels[0], labels[2], weights[2] = 3, -1, 0.0
        wanted = functional.cross_entropy(logits, labels[:, 0], ignore_index=-1, **options)
    loss = reference.softmax_loss(logits, labels, weights, label_smoothing, class_weights)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
