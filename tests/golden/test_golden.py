"""The service returns TensorFlow's results for every cut of the table, in process and on Ray workers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import shardloss
from shardloss_server.placement import Placement
from shardloss_server.rpc.serve import Server

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, dense, runs

TIE = 1e-6  # logits this close, relative to max(1, logit), count as ties
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows


# TensorFlow


TF_SAMPLED = load("tf_sampled_softmax_loss")
TF_FULL = load("tf_full_softmax")


def tf_loss(case: Case, hit_removal: str = "last") -> shardloss.FullSoftmax | shardloss.SampledSoftmax:
    """Return the loss of a TensorFlow case; by default hits are removed by TensorFlow's rule."""
    if case.family == "tf_full_softmax":
        return shardloss.FullSoftmax()
    values = shardloss.SampledValues(case["sampled"], case["true_expected_count"], case["sampled_expected_count"])
    return shardloss.SampledSoftmax(
        sampled_values=values,
        remove_accidental_hits=case.meta["remove_accidental_hits"],
        hit_removal=hit_removal,
    )


def tf_table(tables: Tables, case: Case, cut: Cut) -> shardloss.Table:
    return tables.filled(case["weights"], case["biases"], cut)


@pytest.mark.parametrize("where, case, cut", runs(TF_SAMPLED + TF_FULL))
def test_loss_and_gradients_equal_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss, hidden gradient and table gradient equal TensorFlow's, for ones and for any upstream gradient."""
    table, tolerance = tf_table(tables, case, cut), case.tolerance()
    for suffix, upstream in (("sum", None), ("up", case["upstream"])):
        result = table.compute_loss(
            case["inputs"],
            case["labels"],
            tf_loss(case),
            upstream=upstream,
            want_lse=True,
            want_hidden_grad=True,
            want_table_grad=True,
        )
        assert_matches(result.loss, case["loss"], tolerance, "loss")
        if "logsumexp" in case:
            assert_matches(result.lse, case["logsumexp"], tolerance, "logsumexp")
        assert result.hidden_grad is not None
        g = np.ones(len(result.hidden_grad)) if upstream is None else upstream
        assert_matches(result.hidden_grad * g[:, None], case[f"grad_inputs_{suffix}"], tolerance, "hidden gradient")
        rows, biases = dense(result.table_grad, case["weights"])
        assert_matches(rows, case[f"grad_weights_{suffix}"], tolerance, "row gradient")
        assert_matches(biases, case[f"grad_biases_{suffix}"], tolerance, "bias gradient")


HITS = [case for case in TF_SAMPLED if "alt_loss_every_hit_removed" in case]


@pytest.mark.parametrize("where, case, cut", runs(HITS))
def test_by_default_every_copy_of_an_accidental_hit_is_removed(tables: Tables, case: Case, cut: Cut) -> None:
    """hit_removal "every" is Paddle's rule; "last" is TensorFlow's, and the two differ if a hit was drawn twice."""
    table = tf_table(tables, case, cut)
    every = table.compute_loss(case["inputs"], case["labels"], tf_loss(case, "every")).loss
    assert_matches(every, case["alt_loss_every_hit_removed"], case.tolerance(), "loss")
    assert np.abs(every - case["loss"]).max() > 1e-3


def test_a_shard_holds_the_classes_that_tensorflow_gives_it() -> None:
    """Both placements put the same class ids on the same shard in the same order as embedding_lookup does."""
    for case in [case for case in TF_SAMPLED if case.cut is not None]:
        assert case.cut is not None
        placement = Placement(case.cut.placement, len(case["weights"]), case.cut.num_shards)
        for shard in range(case.cut.num_shards):
            held = placement.class_ids(shard, 0, placement.num_rows(shard))
            np.testing.assert_array_equal(held.numpy(), case[f"shard_rows_{shard}"], err_msg=str(case))


@pytest.mark.parametrize("where, case, cut", runs(TF_FULL))
def test_the_best_classes_equal_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """TopK equals tf.math.top_k: logits descend, and ties go to the lower id."""
    expected = case["topk_ids"]
    best = tf_table(tables, case, cut).top_k(case["inputs"], expected.shape[1])
    np.testing.assert_array_equal(best.class_ids, expected)
    assert_matches(best.logits, case["topk_values"], case.tolerance(), "logits")
    log_probs = case["topk_values"].astype(np.float64) - case["logsumexp"].astype(np.float64)[:, None]
    assert_matches(best.log_probs, log_probs, case.tolerance() * 2, "log probabilities")


@pytest.mark.parametrize("where, case, cut", runs(TF_FULL))
def test_ranks_agree_with_in_top_k(tables: Tables, case: Case, cut: Cut) -> None:
    """A true class is in the top k iff its logit reaches the k-th best; its rank exceeds k only if it ties there."""
    table, k = tf_table(tables, case, cut), case["topk_ids"].shape[1]
    logits = table.score(case["inputs"], case["labels"]).logits
    border = table.top_k(case["inputs"], k).logits[:, -1:]
    tied = np.abs(logits - border) <= TIE * np.maximum(1.0, np.abs(border))
    np.testing.assert_array_equal((logits > border) | tied, case["in_top5"])
    ranks = [table.evaluate(case["inputs"], column).rank for column in case["labels"].T]
    in_top = np.stack(ranks, axis=1) <= k
    np.testing.assert_array_equal(in_top | tied, case["in_top5"])
    np.testing.assert_array_equal(in_top, (case["labels"][:, :, None] == case["topk_ids"][:, None, :]).any(2))


@pytest.mark.parametrize("where, case, cut", runs([case for case in TF_FULL if case["labels"].shape[1] == 1]))
def test_evaluation_equals_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """The exact loss of Evaluate equals TensorFlow's full softmax loss."""
    evaluation = tf_table(tables, case, cut).evaluate(case["inputs"], case["labels"][:, 0])
    assert_matches(evaluation.loss, case["loss"], case.tolerance(), "loss")


# The training path


def first(cases: list[Case], count: int = 4) -> list[Case]:
    return cases[:count]


@pytest.mark.parametrize("where, case, cut", runs(first(TF_SAMPLED) + first(TF_FULL)))
def test_a_committed_step_subtracts_tensorflows_gradient(tables: Tables, case: Case, cut: Cut) -> None:
    """ComputeLoss and Commit with upstream g are one SGD step: weights - lr * gradient, and likewise for biases."""
    table = tables.fresh(case["weights"], case["biases"], cut)
    try:
        session = table.session()
        result = session.compute_loss(case["inputs"], case["labels"], tf_loss(case))
        assert_matches(result.loss, case["loss"], case.tolerance(), "loss")
        session.commit([(result, case["upstream"])], learning_rate=LEARNING_RATE)
        after = table.read_rows(np.arange(len(case["weights"])))
        weights = case["weights"] - LEARNING_RATE * case["grad_weights_up"]
        biases = case["biases"] - LEARNING_RATE * case["grad_biases_up"]
        assert_matches(after.rows, weights, case.tolerance(), "rows")
        assert_matches(after.biases, biases, case.tolerance(), "biases")
    finally:
        table.client.delete_table(table.name)


# Assumptions of the runs above


def test_the_index_holds_every_family_that_is_tested() -> None:
    """No family is skipped because it is missing."""
    assert TF_SAMPLED
    assert TF_FULL
    assert HITS


def test_a_golden_file_is_what_the_index_says() -> None:
    """The file holds exactly the arrays of the index, with their dtypes and shapes."""
    for case in load():
        found = {name: [array.dtype.name, list(array.shape)] for name, array in case.arrays.items() if name != "meta"}
        assert found == case.meta["arrays"], case


@pytest.mark.ray
def test_ray_shards_are_computed_by_other_processes(ray_server: Server) -> None:
    """Every worker is a separate process, and none is the front end."""
    pids = ray_server.catalog.group.pids
    assert len(pids) == 2
    assert len({*pids, os.getpid()}) == 3
