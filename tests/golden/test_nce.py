"""The service's noise-contrastive estimation equals TensorFlow's nce_loss for every cut of the table."""

from __future__ import annotations

import numpy as np
import pytest
import shardloss

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, dense, runs

NCE = load("tf_nce_loss")
HITS = [case for case in NCE if "alt_loss_every_hit_removed" in case]


def nce(case: Case, hit_removal: str = "last") -> shardloss.SampledLogistic:
    """Return the loss of a case; by default hits are removed by TensorFlow's rule."""
    values = shardloss.SampledValues(case["sampled"], case["true_expected_count"], case["sampled_expected_count"])
    return shardloss.SampledLogistic(
        sampled_values=values,
        remove_accidental_hits=case.meta["remove_accidental_hits"],
        hit_removal=hit_removal,
    )


@pytest.mark.parametrize("where, case, cut", runs(NCE))
def test_loss_and_gradients_equal_tensorflow(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss, hidden gradient and table gradient equal TensorFlow's, for ones and for any upstream gradient."""
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
    """hit_removal "every" is Paddle's rule; it differs from TensorFlow's if a hit was drawn twice."""
    table = tables.filled(case["weights"], case["biases"], cut)
    every = table.compute_loss(case["inputs"], case["labels"], nce(case, "every")).loss
    assert_matches(every, case["alt_loss_every_hit_removed"], case.tolerance(), "loss")
    assert np.abs(every - case["loss"]).max() > 1e-3


def test_the_index_holds_what_is_tested() -> None:
    """The cases remove hits and keep them, and use both placements."""
    assert {case.meta["remove_accidental_hits"] for case in NCE} == {False, True}
    assert {case.cut.placement for case in NCE if case.cut is not None} == {"div", "mod"}
    assert HITS
