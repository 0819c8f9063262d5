"""A softmax head equals torch.nn.functional.cross_entropy with `weight`, and with logits times a learned scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, table_of
from shardloss.errors import InvalidArgument


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    return client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, num_shards=3, dtype="float64")


@pytest.fixture
def hidden() -> torch.Tensor:
    """hidden [N, D] that requires a gradient."""
    return torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("num_ignored", [0, 2, BATCH], ids="ignored={}".format)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0], ids="smoothing={}".format)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_step_is_that_of_torchs_cross_entropy(
    table: shardloss.Table, hidden: torch.Tensor, reduction: str, smoothing: float, num_ignored: int
) -> None:
    """Loss and updated rows and biases equal torch's, with a class of weight 0; the mean of no counted rows is nan."""
    class_weights = torch.rand(NUM_CLASSES, dtype=torch.float64)
    class_weights[1] = 0.0
    labels = torch.randint(0, NUM_CLASSES, (BATCH,))
    labels[BATCH - 1], labels[:num_ignored] = 1, -100
    rows, biases = (value.clone().requires_grad_() for value in table_of(table))
    head = table.softmax(class_weights=class_weights.numpy(), label_smoothing=smoothing, reduction=reduction)
    optimizer = head.optimizer(0.5)
    loss = head(hidden, labels)
    expected = torch.nn.functional.cross_entropy(
        hidden.detach().requires_grad_() @ rows.T + biases,
        labels,
        class_weights,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-12, equal_nan=True)
    upstream = torch.rand_like(expected)
    loss.backward(upstream)
    expected.backward(upstream)
    optimizer.step()
    assert rows.grad is not None
    assert biases.grad is not None
    torch.testing.assert_close(table_of(table)[0], (rows - 0.5 * rows.grad).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(table_of(table)[1], (biases - 0.5 * biases.grad).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [False, True], ids=["even", "given"])
def test_several_labels_a_row_weigh_by_their_classes(table: shardloss.Table, hidden: torch.Tensor, given: bool) -> None:
    """Each label's weight, given or equal over the labels that are not ignored, is multiplied by its class's weight."""
    class_weights = torch.rand(NUM_CLASSES, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, (BATCH, 3))
    labels[0, 1:], labels[1, 0] = -100, -100
    counted = (labels != -100).double()
    weights = torch.rand(BATCH, 3, dtype=torch.float64) if given else counted / counted.sum(1, keepdim=True)
    rows, biases = table_of(table)
    log_p = (hidden.detach() @ rows.T + biases).log_softmax(1).gather(1, labels.clamp(min=0))
    expected = -(weights * counted * class_weights[labels.clamp(min=0)] * log_p).sum(1)
    head = table.softmax(class_weights=class_weights.numpy(), reduction="none")
    losses = head(hidden, labels, weights if given else None)
    torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=1e-12)


def test_a_learned_scale_multiplies_that_of_the_loss(table: shardloss.Table, hidden: torch.Tensor) -> None:
    """logits = 2 * scale * (hidden . row + bias), and the gradient is that of the learned factor alone."""
    labels = torch.randint(0, NUM_CLASSES, (BATCH,))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    twin = scale.detach().clone().requires_grad_()
    rows, biases = table_of(table)
    logits = 2.0 * twin * (hidden.detach() @ rows.T + biases)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    loss = table.softmax(logits=shardloss.LogitTransform(scale=2.0))(hidden, labels, scale=scale)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(scale.grad, twin.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("label", [-1, NUM_CLASSES, 2**40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_that_is_no_class_is_refused_by_its_place(
    table: shardloss.Table, hidden: torch.Tensor, label: int, smoothing: float
) -> None:
    """The error names the label's place, as without class weights, instead of failing in the lookup of the weights."""
    labels = torch.zeros(BATCH, dtype=torch.int64)
    labels[2] = label
    with pytest.raises(InvalidArgument) as caught:
        table.softmax(class_weights=np.ones(NUM_CLASSES), label_smoothing=smoothing)(hidden, labels)
    assert (caught.value.field, caught.value.index) == ("labels", "2, 0")


@pytest.mark.parametrize(
    "weights",
    [
        np.ones(NUM_CLASSES - 1),
        np.ones((NUM_CLASSES, 1)),
        np.ones(NUM_CLASSES, dtype=np.int64),
        np.full(NUM_CLASSES, -1.0),
        np.full(NUM_CLASSES, np.nan),
        np.full(NUM_CLASSES, np.inf),
    ],
    ids=["short", "matrix", "integers", "negative", "nan", "inf"],
)
def test_class_weights_that_are_none_are_refused_when_the_head_is_made(
    table: shardloss.Table, weights: np.ndarray
) -> None:
    """The error names class_weights, not the label weights that are computed from them."""
    with pytest.raises(InvalidArgument) as caught:
        table.softmax(class_weights=weights)
    assert caught.value.field == "class_weights"


def test_class_weights_get_no_gradient(table: shardloss.Table, hidden: torch.Tensor) -> None:
    """Class weights given as a parameter are used by value and get no gradient."""
    weights = torch.nn.Parameter(torch.ones(NUM_CLASSES, dtype=torch.float64))
    table.softmax(class_weights=weights)(hidden, torch.arange(BATCH) % NUM_CLASSES).backward()  # type: ignore[arg-type]
    assert weights.grad is None
