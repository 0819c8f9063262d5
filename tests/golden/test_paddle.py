"""shardloss.compat.paddle returns Paddle's results over every cut of a table and over dense tensors.

The golden cases hold logits only, so the table is the identity matrix and hidden holds the logits.
"""

from __future__ import annotations

import numpy as np
import pytest
import shardloss
import torch
from shardloss.compat import paddle
from shardloss.lazy import LazyLogits, LazySoftmax
from torch import Tensor

from .cases import Case, Cut, assert_matches, load
from .tables import Tables, runs

SHARDS = (1, 2, 3)  # 3 shards of 11 classes are uneven; test_golden.py covers more cuts of the same sums
CHUNK = 7  # 11 classes are two chunks, the second one short
LEARNING_RATE = 0.375  # exact in float32, so only the gradient's own rounding shows

SOFTMAX = load("paddle_softmax_with_cross_entropy")
QUIRKS = load("paddle_quirk")
CROSS_ENTROPY = load("paddle_cross_entropy")
SAMPLED = load("paddle_sampled_softmax_oracle")
MARGIN = load("margin_cross_entropy_oracle")
CENTERS = load("paddle_class_center_sample")
HARD = [case for case in SOFTMAX if not case.meta["soft_label"]]


def axis_of(case: Case) -> int:
    """Return the axis of the classes."""
    return int(case.meta.get("axis", -1))


def flat(case: Case, name: str) -> np.ndarray:
    """Return an array with its class axis last, flattened to [N, classes or 1]."""
    moved = np.moveaxis(case[name], axis_of(case), -1)
    return moved.reshape(-1, moved.shape[-1])


def identity(case: Case, name: str = "logits") -> np.ndarray:
    """Return the identity matrix as rows, so that the logits equal hidden."""
    return np.eye(case[name].shape[axis_of(case)], dtype=case.dtype)


def lazy(tables: Tables, case: Case, cut: Cut, name: str = "logits") -> LazyLogits:
    """Return the case's logits, flattened, as logits of a table; hidden requires a gradient."""
    hidden = torch.tensor(flat(case, name)).requires_grad_()
    return tables.filled(identity(case, name), None, cut).logits(hidden)


def dense(case: Case, name: str = "logits") -> Tensor:
    """Return the case's logits as a local tensor that requires a gradient."""
    return torch.tensor(case[name]).requires_grad_()


def gradient_tolerance(case: Case) -> float:
    """Return the README's tolerance, but at least 1e-7 for soft labels: Paddle's sum to 1 only within float32."""
    return max(case.tolerance(), 1e-7 if case.meta.get("soft_label") else 0.0, smoothing_tolerance(case))


def smoothing_tolerance(case: Case) -> float:
    """Return the README's tolerance for label smoothing, which Paddle computes in float32."""
    return 1e-6 if case.meta.get("label_smoothing") else 0.0


def assert_gradients(case: Case, loss: Tensor, inputs: Tensor, like: dict[str, np.ndarray]) -> None:
    """Assert that the gradients of loss.sum() and of (loss * upstream).sum() equal the case's."""
    for suffix, upstream in (("sum", torch.ones_like(loss)), ("up", torch.tensor(like["upstream"]))):
        (gradient,) = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        assert_matches(gradient.numpy(), like[suffix], gradient_tolerance(case), f"gradient of {suffix}")


def flat_gradients(case: Case) -> dict[str, np.ndarray]:
    """Return the gradients and upstream of a case, classes last."""
    names = {"sum": "grad_logits_sum", "up": "grad_logits_up", "upstream": "upstream"}
    return {short: flat(case, name) for short, name in names.items()}


def own_gradients(case: Case) -> dict[str, np.ndarray]:
    """Return the gradients and upstream of a case in its own shapes."""
    return {"sum": case["grad_logits_sum"], "up": case["grad_logits_up"], "upstream": case["upstream"]}


def held(softmax: LazySoftmax) -> np.ndarray:
    """Return all chunks of a lazy softmax, concatenated."""
    chunks = list(softmax.probability_chunks(CHUNK))
    assert [i for class_ids, _ in chunks for i in class_ids] == list(range(softmax.shape[-1]))
    return torch.cat([chunk for _, chunk in chunks], -1).numpy()


# softmax_with_cross_entropy


def softmax_options(case: Case) -> dict[str, object]:
    """Return the options that a case was computed with."""
    return {name: case.meta[name] for name in ("soft_label", "ignore_index") if name in case.meta}


@pytest.mark.parametrize("where, case, cut", runs(SOFTMAX, SHARDS))
def test_softmax_of_a_table_is_paddles(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss, softmax and gradients equal Paddle's, for hard and soft labels; ignored rows have loss and gradient 0."""
    logits, label = lazy(tables, case, cut), torch.tensor(flat(case, "label"))
    loss, softmax = paddle.softmax_with_cross_entropy(logits, label, return_softmax=True, **softmax_options(case))
    assert_matches(loss.detach().numpy(), flat(case, "loss"), case.tolerance(), "loss")
    assert_matches(held(softmax), flat(case, "softmax"), case.tolerance(), "softmax")
    assert_gradients(case, loss, logits.hidden, flat_gradients(case))
    if not case.meta["soft_label"]:
        ignored = label[:, 0] == case.meta["ignore_index"]
        (gradient,) = torch.autograd.grad(loss.sum(), logits.hidden)
        assert not loss[ignored].any()
        assert not gradient[ignored].any()


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_softmax_of_a_tensor_is_paddles(case: Case) -> None:
    """The results equal Paddle's in the case's own shape and on its own axis."""
    logits, label = dense(case), torch.tensor(case["label"])
    loss, softmax = paddle.softmax_with_cross_entropy(
        logits, label, return_softmax=True, axis=axis_of(case), **softmax_options(case)
    )
    assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
    assert_matches(softmax.detach().numpy(), case["softmax"], case.tolerance(), "softmax")
    assert_gradients(case, loss, logits, own_gradients(case))


@pytest.mark.parametrize("where, case, cut", runs(QUIRKS, SHARDS))
def test_losses_above_64_are_exact(tables: Tables, case: Case, cut: Cut) -> None:
    """No logit is clipped: Paddle's CPU kernel stops at 64, but our loss is exact, over a table and over a tensor."""
    label = torch.tensor(flat(case, "label"))
    for logits in (lazy(tables, case, cut), dense(case)):
        loss = paddle.softmax_with_cross_entropy(logits, label).detach().numpy()
        assert_matches(loss, case["exact_loss"], case.tolerance(), "loss")
        assert np.abs(loss - case["loss"]).max() > 1.0


# cross_entropy


def cross_entropy_arguments(case: Case) -> dict[str, object]:
    """Return the label, weight and options of a case."""
    names = ("ignore_index", "reduction", "soft_label", "label_smoothing")
    weight = torch.tensor(case["weight"]) if case.meta["weighted"] else None
    return {name: case.meta[name] for name in names} | {"label": torch.tensor(case["label"]), "weight": weight}


def assert_cross_entropy(case: Case, out: Tensor, inputs: Tensor) -> None:
    """Assert that out, in its own shape, and the gradient of its sum equal the case's."""
    tolerance = max(case.tolerance(), smoothing_tolerance(case))
    assert_matches(out.detach().numpy(), case["out"], tolerance, "out")
    (gradient,) = torch.autograd.grad(out.sum(), inputs)
    assert_matches(gradient.numpy(), case["grad_input"], gradient_tolerance(case), "gradient")


@pytest.mark.parametrize("where, case, cut", runs(CROSS_ENTROPY, SHARDS))
def test_cross_entropy_of_a_table_is_paddles(tables: Tables, case: Case, cut: Cut) -> None:
    """Results equal Paddle's for weights, smoothing, soft labels, and every reduction with its denominator."""
    logits = lazy(tables, case, cut, "input")
    assert_cross_entropy(case, paddle.cross_entropy(logits, **cross_entropy_arguments(case)), logits.hidden)


@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_cross_entropy_of_a_tensor_is_paddles(case: Case) -> None:
    """Over a dense tensor, torch computes the same results."""
    logits = dense(case, "input")
    assert_cross_entropy(case, paddle.cross_entropy(logits, **cross_entropy_arguments(case)), logits)


@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_cross_entropy_of_probabilities_is_that_of_their_logits(case: Case) -> None:
    """use_softmax=False with probabilities gives the same results, with the same options."""
    logits = dense(case, "input")
    out = paddle.cross_entropy(logits.softmax(-1), use_softmax=False, **cross_entropy_arguments(case))
    assert_cross_entropy(case, out, logits)


# sampled_softmax_with_cross_entropy


def sampled_arguments(case: Case) -> dict[str, object]:
    """Return the label, sample columns and options of a case."""
    names = ("label", "customized_samples", "customized_probabilities")
    options = ("num_samples", "num_true", "remove_accidental_hits", "use_customized_samples")
    return {name: torch.tensor(case[name]) for name in names} | {name: case.meta[name] for name in options}


@pytest.mark.parametrize("where, case, cut", runs(SAMPLED, SHARDS))
def test_sampled_softmax_of_a_table_is_the_oracles(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss and logit gradients equal the oracle's, with separate samples per row and with hits removed or kept."""
    logits = lazy(tables, case, cut)
    loss = paddle.sampled_softmax_with_cross_entropy(logits, **sampled_arguments(case))
    assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
    assert_gradients(case, loss, logits.hidden, own_gradients(case))


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_sampled_softmax_of_a_tensor_is_the_oracles(case: Case) -> None:
    """Over a dense tensor, torch computes the same loss and gradients."""
    logits = dense(case)
    loss = paddle.sampled_softmax_with_cross_entropy(logits, **sampled_arguments(case))
    assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
    assert_gradients(case, loss, logits, own_gradients(case))


# margin_cross_entropy


def margin_options(case: Case) -> dict[str, object]:
    """Return the options that a case was computed with."""
    return {name: case.meta[name] for name in ("margin1", "margin2", "margin3", "scale")}


@pytest.mark.parametrize("where, case, cut", runs(MARGIN, SHARDS))
def test_margin_loss_of_a_table_is_the_oracles(tables: Tables, case: Case, cut: Cut) -> None:
    """Loss, softmax and gradients in the cosines (hidden times the rows) equal the oracle's."""
    logits, label = lazy(tables, case, cut), torch.tensor(case["label"])
    loss, softmax = paddle.margin_cross_entropy(
        logits, label, return_softmax=True, reduction="none", **margin_options(case)
    )
    assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
    assert_matches(held(softmax), case["softmax"], case.tolerance(), "softmax")
    assert_matches(softmax.probabilities(label[:, None]).numpy()[:, 0], at_label(case), case.tolerance(), "of labels")
    assert_gradients(case, loss, logits.hidden, own_gradients(case))


@pytest.mark.parametrize("case", MARGIN, ids=str)
def test_margin_loss_of_a_tensor_is_the_oracles(case: Case) -> None:
    """Over a dense tensor, torch computes the same loss, softmax and gradients."""
    logits, label = dense(case), torch.tensor(case["label"])
    loss, softmax = paddle.margin_cross_entropy(
        logits, label, return_softmax=True, reduction="none", **margin_options(case)
    )
    assert_matches(loss.detach().numpy(), case["loss"], case.tolerance(), "loss")
    assert_matches(softmax.detach().numpy(), case["softmax"], case.tolerance(), "softmax")
    assert_gradients(case, loss, logits, own_gradients(case))


def at_label(case: Case) -> np.ndarray:
    """Return the softmax probability of each row's label."""
    return np.take_along_axis(case["softmax"], case["label"].reshape(-1, 1), 1)[:, 0]


# class_center_sample


@pytest.mark.parametrize("case", CENTERS, ids=str)
def test_class_centers_are_paddles(case: Case) -> None:
    """Paddle's positives are first, at Paddle's places, followed by as many distinct classes that are not labels."""
    label, theirs = torch.tensor(case["label"]), case["sampled_class_center"]
    num_positives = len(set(case["label"].tolist()))
    remapped, centers = paddle.class_center_sample(label, case.meta["num_classes"], case.meta["num_samples"])
    np.testing.assert_array_equal(remapped.numpy(), case["remapped_label"])
    np.testing.assert_array_equal(centers[:num_positives].numpy(), theirs[:num_positives])
    assert (centers.dtype, centers.shape) == (label.dtype, theirs.shape)
    assert len(set(centers.tolist())) == len(theirs)
    assert 0 <= centers.min() <= centers.max() < case.meta["num_classes"]


# The training path


@pytest.mark.parametrize("where, case, cut", runs(HARD[:4] + QUIRKS, SHARDS))
def test_a_committed_step_subtracts_paddles_gradient(tables: Tables, case: Case, cut: Cut) -> None:
    """With the identity as rows, the step is lr * (logit gradient)^T @ logits; ignored rows do not contribute."""
    table = tables.fresh(identity(case), None, cut)
    try:
        logits, optimizer = flat(case, "logits"), paddle.optimizer(table, LEARNING_RATE)
        loss = paddle.softmax_with_cross_entropy(
            table.logits(torch.tensor(logits)), torch.tensor(flat(case, "label")), **softmax_options(case)
        )
        if "grad_logits_up" in case:
            loss.backward(torch.tensor(flat(case, "upstream")))
            dlogits = flat(case, "grad_logits_up")
        else:
            loss.sum().backward()
            dlogits = exact_logit_gradient(case)
        optimizer.step()
        expected = identity(case) - LEARNING_RATE * dlogits.T.astype(np.float64) @ logits
        after = table.read_rows(np.arange(len(expected)))
        assert after.biases is None
        assert_matches(after.rows, expected, case.tolerance(), "rows")
    finally:
        table.client.delete_table(table.name)


def exact_logit_gradient(case: Case) -> np.ndarray:
    """Return softmax - one-hot, computed by torch in float64, for a case that holds no gradient."""
    logits = torch.tensor(flat(case, "logits"), dtype=torch.float64, requires_grad=True)
    label = torch.tensor(flat(case, "label")[:, 0])
    torch.nn.functional.cross_entropy(logits, label, reduction="sum", ignore_index=-100).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


# Assumptions of the runs above


def test_the_index_holds_every_family_that_is_tested() -> None:
    """No family is skipped because it is missing; soft labels, weights and smoothing are among the cases."""
    assert all((SOFTMAX, QUIRKS, CROSS_ENTROPY, SAMPLED, MARGIN, CENTERS))
    assert 0 < len(HARD) < len(SOFTMAX)
    assert any(case.meta["weighted"] for case in CROSS_ENTROPY)
    assert any(case.meta["label_smoothing"] for case in CROSS_ENTROPY)


@pytest.mark.parametrize("where, case, cut", runs(HARD[:1], (7,)))
def test_a_loss_through_the_client_alone_is_paddles(tables: Tables, case: Case, cut: Cut) -> None:
    """compute_loss, which needs no torch, gives Paddle's results; 7 shards of 11 classes are uneven."""
    table = tables.filled(identity(case), None, cut)
    result = table.compute_loss(
        flat(case, "logits"),
        flat(case, "label"),
        shardloss.FullSoftmax(),
        ignore_index=case.meta["ignore_index"],
        want_hidden_grad=True,
    )
    assert_matches(result.loss, flat(case, "loss")[:, 0], case.tolerance(), "loss")
    assert_matches(result.hidden_grad, flat(case, "grad_logits_sum"), case.tolerance(), "gradient of the sum")
