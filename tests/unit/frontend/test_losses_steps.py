"""Gradients are slopes of the served losses, and a commit applies exactly these, whatever the losses of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from shardloss.errors import StepReused, TicketAborted, TicketUnknown
from shardloss_server.frontend.request import CommitNow, LossRequest, PartialFc, SampledSoftmax, SampledValues
from torch import Tensor

from ...extent import EVERYTHING
from ..cases import (
    CANDIDATES,
    SEEN,
    STEP,
    WRITTEN,
    Case,
    D,
    N,
    V,
    expected,
    finer,
    full_softmax_cases,
    margin_cases,
    randn,
    sampled_cases,
    sampled_margin_cases,
    sampler,
    sigmoid_cases,
    values,
)
from ..front import Front, Table, request_of, soon

RATE = 0.3
EPS = 1e-5  # central differences err by EPS^2 + rounding / EPS, about 1e-10


def table_of(front: Front, place: int, bias: bool = True) -> Table:
    """Return a random table, sharded in one of three ways, with class counts."""
    num_shards, strategy = [(1, "div"), (3, "mod"), (7, "div")][place % 3]
    biases = randn(V) if bias else None
    table = front.table(0.7 * randn(V, D), biases, num_shards=num_shards, strategy=strategy, count_labels=True)
    table.owner.counts.write(0, WRITTEN.numpy())
    table.owner.counts.learn(SEEN.numpy())
    return table


def groups() -> dict[str, tuple[bool, Iterator[Case]]]:
    """Return (True if the table has biases, cases) per loss: every seventh sampled case, every third of most others."""
    every = 1 if EVERYTHING else 3
    every_draw = {
        kind: (True, islice(sampled_cases(kind), place % 5, None, 7)) for place, kind in enumerate(CANDIDATES)
    }
    return {
        "full softmax": (True, islice(full_softmax_cases(), 0, None, every)),
        "sigmoid": (True, islice(sigmoid_cases(), 0, None, every)),
        "margins": (False, margin_cases()),
        "margins over candidates": (False, islice(sampled_margin_cases("repeated values"), 0, None, every)),
        **every_draw,
    }


every_group = pytest.mark.parametrize("group", list(groups()))


@every_group
def test_gradients_are_slopes_of_the_loss(front: Front, group: str) -> None:
    """Central differences agree along a random direction of hidden, rows, biases and scale at once."""
    bias, cases = groups()[group]
    table = table_of(front, 1, bias)
    weights, biases = table.read()
    for case in cases:
        request, g = case.request, randn(N)
        table.write(weights, biases if bias else None)
        reply = table.loss(finer(request, True, g))
        d_hidden, d_weights, d_biases, d_scale = randn(N, D), randn(V, D), randn(V) * bias, float(randn(1))

        def loss_at(step: float) -> float:
            table.write(weights + step * d_weights, biases + step * d_biases if bias else None)  # noqa: B023
            transform = request.objective.transform  # noqa: B023
            transform = replace(transform, scale=transform.scale + step * d_scale)  # noqa: B023
            objective = replace(request.objective, transform=transform)  # noqa: B023
            moved = replace(request, hidden=request.hidden + step * d_hidden, objective=objective)  # noqa: B023
            return float((g * table.loss(moved).loss).sum())  # noqa: B023

        weights_grad, biases_grad = table.dense(reply.table_grad)
        served = ((g[:, None] * reply.hidden_grad) * d_hidden).sum() + d_scale * (g * reply.scale_grad).sum()
        served += (weights_grad * d_weights).sum() + (biases_grad * d_biases).sum()
        slope = (loss_at(EPS) - loss_at(-EPS)) / (2 * EPS)
        assert slope == pytest.approx(float(served), rel=1e-6, abs=1e-6), str(case)


@every_group
def test_a_commit_of_two_losses_is_one_step_at_the_version_before_it(front: Front, group: str) -> None:
    """Two parts of different losses, often with row writes between scoring and commit, are committed as one step."""
    bias, cases = groups()[group]
    several = list(cases)
    for place, pair in enumerate(zip(several, several[1:] + several[:1], strict=True)):
        table = table_of(front, place, bias)
        gs = [randn(N), randn(N)]
        tickets = [table.open(case.request, STEP, part) for part, case in enumerate(pair)]
        keeps_its_negatives = any(c.request.sampled and c.request.sampled.num_hard_negatives for c in pair)
        staleness = 0 if keeps_its_negatives else place % 4  # mined candidates stay those of the version scored
        for _ in range(staleness):
            table.write(0.7 * randn(V, D), randn(V) if bias else None)
        weights, biases = table.read()
        grads = [expected(weights, biases, c.request, table.owner.counts, g) for c, g in zip(pair, gs, strict=True)]
        reply = table.commit(STEP, list(zip(tickets, gs, strict=True)), RATE)
        assert reply.staleness == staleness
        now_weights, now_biases = table.read()
        moved = weights - RATE * sum(grad.weights_grad for grad in grads)
        torch.testing.assert_close(now_weights, moved, rtol=1e-10, atol=1e-10, msg=lambda t: f"{pair[0]}\n{t}")  # noqa: B023
        moved = biases - RATE * bias * sum(grad.biases_grad for grad in grads)
        torch.testing.assert_close(now_biases, moved, rtol=1e-10, atol=1e-10, msg=lambda t: f"{pair[0]}\n{t}")  # noqa: B023


def test_mined_candidates_stay_those_of_the_version_scored(front: Front) -> None:
    """If rows move between scoring and commit, the step is over the candidates that were the best when scored."""
    table = table_of(front, 1)
    labels = torch.randint(0, V, (N, 1))
    draw = values(labels, torch.randperm(V)[:11])
    request = request_of(randn(N, D), labels, sampled=SampledSoftmax(draw, "every", None, 3))
    weights, biases = table.read()
    logits = request.hidden @ weights[draw.sampled].T + biases[draw.sampled] - draw.sampled_expected_count.log()
    best = logits.masked_fill(labels == draw.sampled, -torch.inf).topk(3).indices
    own = SampledValues(draw.sampled[best], draw.true_expected_count, draw.sampled_expected_count[best])
    g, ticket = randn(N), table.open(request, 1)
    table.write(randn(V, D), randn(V))
    weights, biases = table.read()
    fixed = request_of(request.hidden, labels, sampled=SampledSoftmax(own, "every"))
    wanted = expected(weights, biases, fixed, table.owner.counts, g)
    table.commit(1, [(ticket, g)], RATE)
    torch.testing.assert_close(table.read()[0], weights - RATE * wanted.weights_grad, rtol=1e-10, atol=1e-10)


def pieces_of(request: LossRequest, sizes: list[int]) -> list[LossRequest]:
    """Split a batch into micro-batches over the same draw."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        piece = replace(request, hidden=request.hidden[rows], labels=request.labels[rows])
        if request.label_weights is not None:
            piece = replace(piece, label_weights=request.label_weights[rows])
        if request.sampled is not None and isinstance(request.sampled.candidates, SampledValues):
            draw = request.sampled.candidates
            own = draw.sampled.dim() == 2
            ids, count = (x[rows] if own else x for x in (draw.sampled, draw.sampled_expected_count))
            cut = SampledValues(ids, draw.true_expected_count[rows], count)
            piece = replace(piece, sampled=replace(request.sampled, candidates=cut))
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("kind", ["full", "a row's own values", "repeated values", "log_uniform", "uniform", "all"])
def test_micro_batches_make_the_step_of_the_whole_batch(front: Front, kind: str) -> None:
    """Parts of 4, 0 and 3 rows in one commit equal all 7 at once: a draw belongs to the step, not the part."""
    source = full_softmax_cases() if kind == "full" else sampled_cases(kind)
    for case in [c for c in source if " ids " not in c.name][::9]:
        whole, cut = (front.table(*rows) for rows in [(0.7 * randn(V, D), randn(V))] for _ in range(2))
        g = randn(N)
        request = replace(case.request, step=1)
        whole.commit(1, [(whole.open(request, 1), g)], RATE)
        pieces = pieces_of(request, [4, 0, 3])
        tickets = [cut.open(piece, 1, part) for part, piece in enumerate(pieces)]
        cut.commit(1, list(zip(tickets, g.split([4, 0, 3]), strict=True)), RATE)
        for a, b in zip(whole.read(), cut.read(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def counts_of(table: Table) -> np.ndarray:
    """Return the learned count of each class, relative to that of class 0."""
    frequency = table.owner.counts.learned_frequency(np.arange(V))
    return np.rint(frequency / frequency.min()).astype(int)  # class 0 is never a label here, so its count is 1


def test_commits_count_the_labels_that_count(front: Front) -> None:
    """Each label of each part is counted once, padding is not; scoring, refused commits and aborts count nothing."""
    table = front.table(randn(V, D), randn(V), count_labels=True)
    labels = torch.randint(1, V, (N, 3))
    labels[2, 1] = labels[5] = -1
    request = request_of(randn(N, D), labels)
    ones = torch.ones(N)
    tickets = [table.open(request, 1, part) for part in range(2)]
    assert (counts_of(table) == 1).all()
    with pytest.raises(TicketUnknown):
        table.commit(1, [(tickets[0], ones), ("nothing", ones)], RATE)
    assert (counts_of(table) == 1).all()
    table.commit(1, [(ticket, ones) for ticket in tickets], RATE)
    seen = 1 + 2 * np.bincount(labels[labels >= 0].numpy(), minlength=V)
    np.testing.assert_array_equal(counts_of(table), seen)
    assert table.commit(1, [(ticket, ones) for ticket in tickets], RATE).replayed
    ticket = table.open(request, 2)
    assert table.front.pipeline.abort(table.spec.name, "session", 2, soon()) == 1
    with pytest.raises(TicketAborted):
        table.commit(2, [(ticket, ones)], RATE)
    table.open(request, 3)
    table.owner.sessions.expire(float("inf"))
    np.testing.assert_array_equal(counts_of(table), seen)


@pytest.mark.parametrize(
    "kind, hit_removal",
    [*[(kind, "every") for kind in CANDIDATES], ("in_batch", "last"), ("corrected in_batch", "last")],
)
def test_a_label_is_a_column_of_its_row(front: Front, kind: str, hit_removal: str) -> None:
    """If the logit of the only label is far above all others, the loss is 0; without its column it would be -60."""
    for label in (3, V - 1):
        biases = torch.zeros(V).double()
        biases[label] = 60.0
        table = front.table(torch.zeros(V, D).double(), biases, num_shards=3, strategy="mod", count_labels=True)
        table.owner.counts.write(0, WRITTEN.numpy())
        labels = torch.full((1, 1), label)  # with one row, an in-batch draw is its own label alone
        draw = CANDIDATES[kind](labels)
        if isinstance(draw, SampledValues) and draw.sampled.dim() == 2:
            draw = values(labels, draw.sampled[:1])
        if isinstance(draw, PartialFc):
            draw = PartialFc(4, 1)
        request = request_of(randn(1, D), labels, sampled=SampledSoftmax(draw, hit_removal))
        loss = float(table.loss(request).loss[0])
        assert 0 <= loss < 1e-15, (loss, draw)


def test_every_label_of_a_batch_is_a_column_of_partial_fc(front: Front) -> None:
    """Even if the batch has more labels than num_sampled, each row's loss is over all of them."""
    table = table_of(front, 2)
    labels = torch.arange(N)[:, None] + 5
    request = request_of(randn(N, D), labels, sampled=SampledSoftmax(PartialFc(3, 1), "every"))
    reply = table.loss(request)
    weights, biases = table.read()
    logits = request.hidden @ weights[labels[:, 0]].T + biases[labels[:, 0]]
    torch.testing.assert_close(reply.loss, logits.logsumexp(1) - logits.diagonal(), rtol=1e-12, atol=1e-12)
    assert set(reply.table_grad.class_ids.tolist()) == set(labels[:, 0].tolist())


def test_a_loss_and_its_gradient_need_no_other_gradient(front: Front) -> None:
    """The loss and the scale's gradient have the same bits if the gradient of hidden is not requested."""
    table = table_of(front, 0)
    request = request_of(randn(N, D), torch.randint(0, V, (N, 1)), sampled=SampledSoftmax(sampler("uniform"), "every"))
    whole = table.loss(finer(request, True, randn(N)))
    alone = table.loss(replace(finer(request, True, randn(N)), want=replace(request.want, hidden_grad=False)))
    assert alone.hidden_grad is None
    assert isinstance(whole.scale_grad, Tensor)
    assert torch.equal(alone.scale_grad, whole.scale_grad)
    assert torch.equal(alone.loss, whole.loss)


def test_a_ticket_accounts_for_its_hard_negatives(front: Front) -> None:
    """Each row has its own, in total more than were drawn, and their bytes count towards max_ticket_bytes."""
    table, num_rows, num_hard = table_of(front, 1), 40, 15
    sampled = SampledSoftmax(sampler("uniform", V), "every", None, num_hard)
    before = front.catalog.budget.num_bytes
    table.open(request_of(randn(num_rows, D), torch.full((num_rows, 1), 3), sampled=sampled), 1)
    candidates_bytes = num_rows * num_hard * (8 + 8)  # a class id and a weight in float64
    assert front.catalog.budget.num_bytes - before >= candidates_bytes


def test_a_refused_repeat_leaves_the_kept_reply(front: Front) -> None:
    """Another payload under the key of an applied step is refused; a true repeat of the step still gets its tensors."""
    table = table_of(front, 1)
    now = CommitNow(RATE, 1.0, 0)
    request = replace(request_of(randn(N, D), torch.full((N, 1), 3)), session="session", step=1, commit_now=now)
    first = table.loss(replace(request, digest=b"one"))
    with pytest.raises(StepReused):
        table.loss(replace(request, digest=b"another"))
    again = table.loss(replace(request, digest=b"one"))
    assert again.replayed
    assert again.loss is not None
    assert first.loss is not None
    assert torch.equal(again.loss, first.loss)
