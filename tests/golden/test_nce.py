"""The service's noise-contrastive estimation is TensorFlow's nce_loss, however the table is cut."""

from __future__ import annotations

import numpy as np
import pytest
import shardloss
import torch
from shardloss.compat import tensorflow

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, dense, runs

NCE = load("tf_nce_loss")
HITS = [case for case in NCE if "alt_loss_every_hit_removed" in case]
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows


def nce(case: Case, hit_removal: str = "last") -> shardloss.SampledLogistic:
    """The loss of a case; hits are removed by TensorFlow's rule."""
    values = shardloss.SampledValues(case["sampled"], case["true_expected_count"], case["sampled_expected_count"])
    return shardloss.SampledLogistic(
        sampled_values=values,
        remove_accidental_hits=case.meta["remove_accidental_hits"],
        hit_removal=hit_removal,
    )


@pytest.mark.parametrize("where, case, cut", runs(NCE))
def test_loss_and_gradients_equal_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss, hidden gradient and table gradient, for ones and for any upstream gradient."""
    table, tolerance = tables.filled(case["weights"], case["biases"], cut), case.tolerance()
    for suffix, upstream in (("sum", None), ("up", case["upstream"])):
        result = table.compute_loss(
            case["inputs"], case["labels"], nce(case), upstream=upstream, want_hidden_grad=True, want_table_grad=True
        )
        assert_matches(result.loss, case["loss"], tolerance, "loss")
        assert result.hidden_grad is not None
        g = np.ones(len(result.hidden_grad)) if upstream is None else upstream
        assert_matches(result.hidden_grad * g[:, None], case[f"grad_inputs_{suffix}"], tolerance, "hidden gradient")
        rows, biases = dense(result.table_grad, case["weights"])
        assert_matches(rows, case[f"grad_weights_{suffix}"], tolerance, "row gradient")
        assert_matches(biases, case[f"grad_biases_{suffix}"], tolerance, "bias gradient")


@pytest.mark.parametrize("where, case, cut", runs(HITS))
def test_by_default_every_copy_of_an_accidental_hit_is_removed(tables: Tables, case: Case, cut: Cut) -> None:
    """hit_removal "every" is Paddle's rule; it differs from TensorFlow's where a hit was drawn twice."""
    table = tables.filled(case["weights"], case["biases"], cut)
    every = table.compute_loss(case["inputs"], case["labels"], nce(case, "every")).loss
    assert_matches(every, case["alt_loss_every_hit_removed"], case.tolerance(), "loss")
    assert np.abs(every - case["loss"]).max() > 1e-3


@pytest.mark.parametrize("case", NCE, ids=str)
def test_the_function_gives_and_trains_what_tensorflows_does(local_tables: Tables, case: Case) -> None:
    """Called as the case called it, on a table cut as the case's: loss, gradient of inputs, and one step of SGD."""
    table = local_tables.fresh(case["weights"], case["biases"], case.cut or Cut(1, "div"))
    arguments = {
        "num_sampled": len(case["sampled"]),
        "num_classes": len(case["weights"]),
        "num_true": case["labels"].shape[1],
        "sampled_values": tuple(
            torch.tensor(case[name]) for name in ("sampled", "true_expected_count", "sampled_expected_count")
        ),
        "remove_accidental_hits": case.meta["remove_accidental_hits"],
    }
    function = tensorflow.nce_loss
    if "compat.v1" in case.meta["op"]:
        function = tensorflow.v1.nce_loss
        arguments["partition_strategy"] = case.meta["partition_strategy"]
    try:
        optimizer = tensorflow.optimizer(table, LEARNING_RATE)
        inputs = torch.tensor(case["inputs"], requires_grad=True)
        loss = function(table, table, torch.tensor(case["labels"]), inputs, **arguments)
        assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
        (loss * torch.tensor(case["upstream"])).sum().backward()
        optimizer.step()
        assert inputs.grad is not None
        assert_matches(inputs.grad.numpy(), case["grad_inputs_up"], case.tolerance(), "gradient of inputs")
        after = table.read_rows(np.arange(len(case["weights"])))
        for name, found in (("weights", after.rows), ("biases", after.biases)):
            expected = case[name] - LEARNING_RATE * case[f"grad_{name}_up"]
            assert_matches(found, expected, case.tolerance(), name)
    finally:
        table.client.delete_table(table.name)


def test_the_index_holds_what_is_tested() -> None:
    """Neither a case of both rules, of both versions nor of both placements is missing."""
    assert {case.meta["remove_accidental_hits"] for case in NCE} == {False, True}
    assert {"compat.v1" in case.meta["op"] for case in NCE} == {False, True}
    assert {case.cut.placement for case in NCE if case.cut is not None} == {"div", "mod"}
    assert HITS
