"""The cost that a call reports."""

from __future__ import annotations

import numpy as np
import pytest
import shardloss
from shardloss.cost import CallCost

N, D, V, S = 7, 5, 11, 4


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: object) -> shardloss.Table:
    return client.create_table(fresh_name(), num_classes=V, dim=D)  # type: ignore[operator]


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((N, D), np.float32), np.arange(N)


def consistent(cost: CallCost | None) -> CallCost:
    """Assert that kernel <= fan-out and that the parts do not exceed the total; return the cost."""
    assert cost is not None
    assert 0 < cost.kernel_s <= cost.fanout_s
    parts = cost.wait_s + cost.plan_s + cost.fanout_s + cost.finish_s
    assert parts <= cost.total_s + 1e-5  # each is rounded to a microsecond
    assert cost.received_bytes > 0
    assert cost.sent_bytes > 0
    return cost


def test_nobody_is_told_who_did_not_ask(table: shardloss.Table) -> None:
    session = table.session()
    loss = session.compute_loss(*batch(), shardloss.FullSoftmax())
    assert loss.cost is None
    assert session.commit([(loss, None)], learning_rate=0.1).cost is None
    hidden, labels = batch()
    assert table.evaluate(hidden, labels).cost is None
    assert table.top_k(hidden, 2).cost is None


@pytest.mark.parametrize("want_grad, passes", [(False, 1), (True, 2)])
def test_a_full_loss_counts_its_products(table: shardloss.Table, want_grad: bool, passes: int) -> None:
    """A full loss counts 2 N V D FLOPs for the logits and as many again for the gradient."""
    found = table.compute_loss(*batch(), shardloss.FullSoftmax(), want_hidden_grad=want_grad, want_cost=True)
    cost = consistent(found.cost)
    assert cost.flops == passes * 2 * N * V * D
    assert cost.received_bytes > 4 * N * D
    assert cost.plan_s > 0
    assert cost.finish_s > 0


def test_a_sampled_loss_counts_its_labels_and_candidates(table: shardloss.Table) -> None:
    """A sampled loss with C distinct candidates counts 2 N (C + T) D FLOPs."""
    loss = shardloss.SampledSoftmax(num_sampled=S, sampler="uniform")
    cost = consistent(table.compute_loss(*batch(), loss, want_cost=True).cost)
    assert cost.flops == 2 * N * (S + 1) * D


def test_a_step_counts_the_gradient_of_the_table(table: shardloss.Table) -> None:
    session = table.session()
    loss = session.compute_loss(*batch(), shardloss.FullSoftmax(), want_cost=True)
    consistent(loss.cost)
    cost = consistent(session.commit([(loss, None)], learning_rate=0.1, want_cost=True).cost)
    assert cost.flops == 2 * N * V * D
    assert cost.plan_s == cost.finish_s == 0.0


def test_a_step_after_another_scores_anew(table: shardloss.Table) -> None:
    """A commit after another one first computes the lse at the current version, which takes one more pass."""
    first, second = table.session(), table.session()
    losses = [session.compute_loss(*batch(), shardloss.FullSoftmax()) for session in (first, second)]
    first.commit([(losses[0], None)], learning_rate=0.1)
    cost = consistent(second.commit([(losses[1], None)], learning_rate=0.1, want_cost=True).cost)
    assert cost.flops == 2 * 2 * N * V * D


def test_the_one_call_form_costs_the_loss_and_its_step(table: shardloss.Table) -> None:
    found = table.session().train_step(*batch(), shardloss.FullSoftmax(), learning_rate=0.1, want_cost=True)
    assert consistent(found.cost).flops == 3 * 2 * N * V * D
    assert found.committed is not None
    assert found.committed.cost is None  # the loss reports it


def test_exact_questions_say_what_all_pages_cost(table: shardloss.Table) -> None:
    hidden, labels = batch()
    of_all, of_one = 2 * N * V * D, 2 * N * D
    assert consistent(table.evaluate(hidden, labels, want_cost=True).cost).flops == of_all + of_one
    assert consistent(table.top_k(hidden, 2, want_cost=True).cost).flops == of_all
    assert consistent(table.score(hidden, np.arange(3), want_cost=True).cost).flops == 3 * of_one
    assert consistent(table.sample_classes(hidden, 2, want_cost=True).cost).flops == of_all
    pages = 30_000 * np.ones((1, D), np.float32).repeat(30_000, 0)
    found = consistent(table.top_k(pages, 1, want_cost=True).cost)
    assert found.flops == 2 * 30_000 * V * D


def test_a_streamed_loss_counts_its_chunks(table: shardloss.Table) -> None:
    """A label distribution is streamed in columns, which adds a pass over the targets to the pass over the logits."""
    hidden, _ = batch()
    labels = np.full((N, V), 1 / V, np.float32)
    found = table.compute_loss(hidden, None, shardloss.FullSoftmax(), label_distribution=labels, want_cost=True)
    cost = consistent(found.cost)
    assert cost.received_bytes > hidden.nbytes + labels.nbytes
    assert cost.flops == 2 * 2 * N * V * D


@pytest.mark.ray
def test_workers_of_every_kind_say_how_long_they_computed(ray_client: shardloss.LossClient, fresh_name: object) -> None:
    made = ray_client.create_table(fresh_name(), num_classes=V, dim=D)  # type: ignore[operator]
    assert consistent(made.compute_loss(*batch(), shardloss.FullSoftmax(), want_cost=True).cost).kernel_s < 60.0
