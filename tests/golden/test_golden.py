"""The service answers as TensorFlow and Paddle do, however the table is cut, in process and on Ray workers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import shardloss
import torch
from shardloss_server.placement import Placement
from shardloss_server.rpc.serve import Server

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, dense, runs

TIE = 1e-6  # logits this close, relative to max(1, logit), are those of equal rows
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows


# TensorFlow


TF_SAMPLED = load("tf_sampled_softmax_loss")
TF_FULL = load("tf_full_softmax")


def tf_loss(case: Case, hit_removal: str = "last") -> shardloss.FullSoftmax | shardloss.SampledSoftmax:
    """The loss of a TensorFlow case; hits are removed by TensorFlow's rule."""
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
    """hit_removal "every" is Paddle's rule; "last" is TensorFlow's, and the two differ where a hit was drawn twice."""
    table = tf_table(tables, case, cut)
    every = table.compute_loss(case["inputs"], case["labels"], tf_loss(case, "every")).loss
    assert_matches(every, case["alt_loss_every_hit_removed"], case.tolerance(), "loss")
    assert np.abs(every - case["loss"]).max() > 1e-3


@pytest.mark.parametrize("case", [case for case in TF_SAMPLED if case.cut is not None], ids=str)
def test_a_shard_holds_the_classes_that_tensorflow_gives_it(case: Case) -> None:
    """Both placements put the same class ids on the same shard in the same order as embedding_lookup does."""
    assert case.cut is not None
    placement = Placement(case.cut.placement, len(case["weights"]), case.cut.num_shards)
    for shard in range(case.cut.num_shards):
        held = placement.class_ids(shard, 0, placement.num_rows(shard))
        np.testing.assert_array_equal(held.numpy(), case[f"shard_rows_{shard}"])


@pytest.mark.parametrize("where, case, cut", runs(TF_FULL))
def test_the_best_classes_equal_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """TopK equals tf.math.top_k: logit descending, of ties the lower id first."""
    expected = case["topk_ids"]
    best = tf_table(tables, case, cut).top_k(case["inputs"], expected.shape[1])
    np.testing.assert_array_equal(best.class_ids, expected)
    assert_matches(best.logits, case["topk_values"], case.tolerance(), "logits")
    log_probs = case["topk_values"].astype(np.float64) - case["logsumexp"].astype(np.float64)[:, None]
    assert_matches(best.log_probs, log_probs, case.tolerance() * 2, "log probabilities")


@pytest.mark.parametrize("where, case, cut", runs(TF_FULL))
def test_ranks_agree_with_in_top_k(tables: Tables, case: Case, cut: Cut) -> None:
    """A true class is in the top k iff its logit reaches the k-th best one; its rank is above k only by a tie there."""
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
    """The exact loss of Evaluate is the full softmax loss."""
    evaluation = tf_table(tables, case, cut).evaluate(case["inputs"], case["labels"][:, 0])
    assert_matches(evaluation.loss, case["loss"], case.tolerance(), "loss")


# Paddle: logits only, so the table is the identity and hidden is the logits.


PADDLE = [case for case in load("paddle_softmax_with_cross_entropy") if not case.meta["soft_label"]]
QUIRKS = load("paddle_quirk")


def identity(case: Case) -> np.ndarray:
    """Rows whose logits are hidden itself."""
    return np.eye(case["logits"].shape[case.meta.get("axis", -1)], dtype=case.dtype)


def flat(case: Case, name: str) -> np.ndarray:
    """An array with its class axis last, flattened to [N, classes or 1]."""
    moved = np.moveaxis(case[name], case.meta.get("axis", -1), -1)
    return moved.reshape(-1, moved.shape[-1])


@pytest.mark.parametrize("where, case, cut", runs(PADDLE))
def test_hard_label_loss_and_gradient_equal_paddle(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss and logit gradient equal softmax_with_cross_entropy; ignored rows have loss 0 and gradient 0."""
    table, tolerance = tables.filled(identity(case), None, cut), case.tolerance()
    labels, ignore = flat(case, "label"), case.meta["ignore_index"]
    result = table.compute_loss(
        flat(case, "logits"), labels, shardloss.FullSoftmax(), ignore_index=ignore, want_hidden_grad=True
    )
    assert result.loss is not None
    assert result.hidden_grad is not None
    assert_matches(result.loss, flat(case, "loss")[:, 0], tolerance, "loss")
    assert_matches(result.hidden_grad, flat(case, "grad_logits_sum"), tolerance, "gradient of the sum")
    scaled = result.hidden_grad * flat(case, "upstream")
    assert_matches(scaled, flat(case, "grad_logits_up"), tolerance, "gradient of the scaled sum")
    ignored = labels[:, 0] == ignore
    assert not result.loss[ignored].any()
    assert not result.hidden_grad[ignored].any()


@pytest.mark.parametrize("where, case, cut", runs(PADDLE))
def test_probabilities_equal_paddle(tables: Tables, case: Case, cut: Cut) -> None:
    """exp of Score's log probabilities is the softmax that Paddle returns."""
    table, logits = tables.filled(identity(case), None, cut), flat(case, "logits")
    log_probs = table.score(logits, np.arange(logits.shape[1]), want_log_probs=True).log_probs
    assert log_probs is not None
    assert_matches(np.exp(log_probs), flat(case, "softmax"), case.tolerance(), "softmax")


@pytest.mark.parametrize("where, case, cut", runs(QUIRKS))
def test_losses_above_64_are_exact(tables: Tables, case: Case, cut: Cut) -> None:
    """No logit is clipped: where Paddle's CPU kernel stops at 64, the loss is the exact one."""
    table = tables.filled(identity(case), None, cut)
    result = table.compute_loss(flat(case, "logits"), flat(case, "label"), shardloss.FullSoftmax())
    assert_matches(result.loss, flat(case, "exact_loss")[:, 0], case.tolerance(), "loss")
    assert np.abs(result.loss - flat(case, "loss")[:, 0]).max() > 1.0


# The training path


def first(cases: list[Case], count: int = 4) -> list[Case]:
    return cases[:count]


@pytest.mark.parametrize("where, case, cut", runs(first(TF_SAMPLED) + first(TF_FULL)))
def test_a_committed_step_subtracts_tensorflows_gradient(tables: Tables, case: Case, cut: Cut) -> None:
    """ComputeLoss, then Commit with upstream g, is one SGD step: weights - lr * gradient, biases alike."""
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


@pytest.mark.parametrize("where, case, cut", runs(first(PADDLE) + QUIRKS))
def test_a_committed_step_subtracts_paddles_gradient(tables: Tables, case: Case, cut: Cut) -> None:
    """With the identity for rows the step is lr * (logit gradient)^T @ logits; ignored rows take no part in it."""
    table = tables.fresh(identity(case), None, cut)
    try:
        logits, session = flat(case, "logits"), table.session()
        result = session.compute_loss(
            logits, flat(case, "label"), shardloss.FullSoftmax(), ignore_index=case.meta.get("ignore_index")
        )
        g, dlogits = None, exact_logit_gradient(case)
        if "grad_logits_up" in case:
            g, dlogits = flat(case, "upstream")[:, 0], flat(case, "grad_logits_up")
        session.commit([(result, g)], learning_rate=LEARNING_RATE)
        expected = identity(case) - LEARNING_RATE * dlogits.T.astype(np.float64) @ logits
        after = table.read_rows(np.arange(len(expected)))
        assert after.biases is None
        assert_matches(after.rows, expected, case.tolerance(), "rows")
    finally:
        table.client.delete_table(table.name)


def exact_logit_gradient(case: Case) -> np.ndarray:
    """softmax - one-hot by torch in float64, for a case that holds no gradient of its own."""
    logits = torch.tensor(flat(case, "logits"), dtype=torch.float64, requires_grad=True)
    label = torch.tensor(flat(case, "label")[:, 0])
    torch.nn.functional.cross_entropy(logits, label, reduction="sum", ignore_index=-100).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


# What the runs above rest on


def test_the_index_holds_every_family_that_is_tested() -> None:
    """No family is skipped because the folder lacks it."""
    assert TF_SAMPLED
    assert TF_FULL
    assert PADDLE
    assert QUIRKS
    assert HITS


@pytest.mark.parametrize("case", load(), ids=str)
def test_a_golden_file_is_what_the_index_says(case: Case) -> None:
    """dtype and shape of every array, and no array more."""
    found = {name: [array.dtype.name, list(array.shape)] for name, array in case.arrays.items() if name != "meta"}
    assert found == case.meta["arrays"]


@pytest.mark.ray
def test_ray_shards_are_computed_by_other_processes(ray_server: Server) -> None:
    """Every worker is a process of its own, and none is the front end."""
    pids = ray_server.catalog.group.pids
    assert len(pids) == 2
    assert len({*pids, os.getpid()}) == 3
