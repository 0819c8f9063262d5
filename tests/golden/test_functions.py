"""The functions of shardloss.compat.tensorflow compute and train the same as TensorFlow's, given the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from shardloss.compat import tensorflow

from .cases import Case, Cut, assert_matches, load
from .tables import Tables

SAMPLED = load("tf_sampled_softmax_loss", "tf_nce_loss")
FULL = load("tf_full_softmax")
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows


def function_of(case: Case) -> Callable[..., torch.Tensor]:
    """Return our function for a case's op."""
    if case.family == "tf_full_softmax":
        return tensorflow.full_softmax_loss
    version = tensorflow.v1 if "compat.v1" in case.meta["op"] else tensorflow
    found: Callable[..., torch.Tensor] = getattr(version, case.meta["op"].split(".")[-1])
    return found


def options_of(case: Case) -> dict[str, Any]:
    """Return the arguments other than table, labels and inputs."""
    if case.family == "tf_full_softmax":
        return {}
    options = {
        "num_sampled": len(case["sampled"]),
        "num_classes": len(case["weights"]),
        "num_true": case["labels"].shape[1],
        "sampled_values": tuple(
            torch.tensor(case[name]) for name in ("sampled", "true_expected_count", "sampled_expected_count")
        ),
        "remove_accidental_hits": case.meta["remove_accidental_hits"],
    }
    if "compat.v1" in case.meta["op"]:
        options["partition_strategy"] = case.meta["partition_strategy"]
    return options


@pytest.mark.parametrize("case", SAMPLED + FULL, ids=str)
def test_the_function_gives_and_trains_what_tensorflows_does(local_tables: Tables, case: Case) -> None:
    """Loss, gradient of inputs and one SGD step equal TensorFlow's, on a table cut as in the case."""
    table = local_tables.fresh(case["weights"], case["biases"], case.cut or Cut(1, "div"))
    try:
        optimizer = tensorflow.optimizer(table, LEARNING_RATE)
        inputs = torch.tensor(case["inputs"], requires_grad=True)
        loss = function_of(case)(table, table, torch.tensor(case["labels"]), inputs, **options_of(case))
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


def test_both_versions_are_among_the_cases() -> None:
    """The cases cover both versions of both sampled losses, and full softmaxes of one label and of several."""
    ops = {case.meta["op"] for case in SAMPLED}
    assert len(ops) == 4
    assert {case["labels"].shape[1] > 1 for case in FULL} == {False, True}
