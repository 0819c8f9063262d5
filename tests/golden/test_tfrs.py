"""The retrieval loss equals that of TensorFlow Recommenders for every cut of the table of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import shardloss
import torch
from shardloss.compat import tfrs

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, dense, runs

TFRS = load("tfrs_retrieval")
TOLERANCE = 5e-6  # the README's tolerance for float32
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows


def loss_of(case: Case) -> shardloss.SampledSoftmax:
    """Return the loss of a case: the classes of the table are the candidates, in their order.

    A row's own candidate is its label, so it is removed from the sampled columns; if hits are kept, its place is used.
    """
    num_queries, num_candidates = len(case["query"]), len(case["candidates"])
    places = np.arange(num_candidates)
    p = case["candidate_sampling_probability"] if case.meta["sampling_correction"] else np.ones(num_candidates)
    ids = case["candidate_ids"] if case.meta["remove_accidental_hits"] else places
    return shardloss.SampledSoftmax(
        sampled_values=shardloss.SampledValues(places, p[:num_queries], p),
        hit_ids=shardloss.HitIds(ids[:num_queries], ids),
        num_hard_negatives=case.meta["num_hard_negatives"] or 0,
        logits=shardloss.LogitTransform(scale=1.0 / (case.meta["temperature"] or 1.0)),
    )


@pytest.mark.parametrize("where, case, cut", runs(TFRS))
def test_loss_and_gradients_equal_tfrs(tables: Tables, case: Case, cut: Cut) -> None:
    """The weighted sum of the losses and its gradients in queries and candidates equal those of TFRS."""
    weight = case["sample_weight"] if case.meta["sample_weight"] else np.ones(len(case["query"]), np.float32)
    result = tables.filled(case["candidates"], None, cut).compute_loss(
        case["query"],
        np.arange(len(case["query"])),
        loss_of(case),
        upstream=weight,
        want_hidden_grad=True,
        want_table_grad=True,
    )
    assert result.loss is not None
    assert result.hidden_grad is not None
    assert_matches((weight * result.loss).sum(), case["loss"], TOLERANCE, "loss")
    assert_matches(weight[:, None] * result.hidden_grad, case["grad_query"], TOLERANCE, "gradient of queries")
    assert_matches(dense(result.table_grad, case["candidates"])[0], case["grad_candidates"], TOLERANCE, "of candidates")


def task_of(case: Case) -> tfrs.Retrieval:
    """Return a task with the options of the case."""
    return tfrs.Retrieval(
        temperature=case.meta["temperature"],
        num_hard_negatives=case.meta["num_hard_negatives"],
        remove_accidental_hits=case.meta["remove_accidental_hits"],
    )


@pytest.mark.parametrize("where, case, cut", runs(TFRS))
def test_the_task_gives_and_trains_what_tfrs_does(tables: Tables, case: Case, cut: Cut) -> None:
    """Given the case's arguments, loss, gradient of queries and one SGD step on the candidates equal those of TFRS."""
    table = tables.fresh(case["candidates"], None, cut)
    try:
        optimizer = tfrs.optimizer(table, LEARNING_RATE)
        query = torch.tensor(case["query"], requires_grad=True)
        given = {
            name: torch.tensor(case[name])
            for name in ("sample_weight", "candidate_sampling_probability", "candidate_ids")
            if name in case
        }
        loss = task_of(case)(query, table.embeddings(np.arange(len(case["candidates"]))), **given)
        assert_matches(loss.detach().numpy(), case["loss"], TOLERANCE, "loss")
        loss.backward()
        optimizer.step()
        assert query.grad is not None
        assert_matches(query.grad.numpy(), case["grad_query"], TOLERANCE, "gradient of queries")
        expected = case["candidates"] - LEARNING_RATE * case["grad_candidates"]
        assert_matches(table.read_rows(np.arange(len(expected))).rows, expected, TOLERANCE, "candidates")
    finally:
        table.client.delete_table(table.name)


def test_the_index_holds_what_is_tested() -> None:
    """The cases cover every option, both used and unused."""
    for option in (
        "temperature",
        "num_hard_negatives",
        "remove_accidental_hits",
        "sampling_correction",
        "sample_weight",
    ):
        assert {bool(case.meta[option]) for case in TFRS} == {False, True}, option
    assert {len(case["query"]) < len(case["candidates"]) for case in TFRS} == {False, True}
