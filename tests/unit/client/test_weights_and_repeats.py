"""Labels that a row lists twice, and weights under every reduction: heads against torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import shardloss
import torch
from shardloss.errors import InvalidArgument
from torch import Tensor
from torch.nn import functional

N, T, D, V = 7, 3, 5, 11  # few classes, so that random labels repeat; the tests make sure of one repetition
IGNORED = -100
REDUCTIONS = ("none", "sum", "mean")


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    spec = {"num_classes": V, "dim": D, "dtype": "float64", "count_labels": True}
    return client.create_table(fresh_name(), initializer=shardloss.Normal(0.7), **spec)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    """Labels [N, T]: row 0 lists a class twice, row 1 three times, row 2 has padding, and row 3 nothing else."""
    labels = torch.randint(V, (N, T))
    labels[0], labels[1], labels[2], labels[3] = torch.tensor([4, 9, 4]), 7, torch.tensor([2, IGNORED, 2]), IGNORED
    return labels


def logits_of(table: shardloss.Table, hidden: Tensor) -> Tensor:
    rows = table.read_rows(np.arange(V))
    assert rows.biases is not None
    return hidden @ torch.from_numpy(rows.rows).T + torch.from_numpy(rows.biases)


def assert_same(loss: Tensor, expected: Tensor, hidden: Tensor) -> None:
    """Compare two losses and their gradients of hidden."""
    torch.testing.assert_close(loss, expected, equal_nan=True)
    ones = torch.ones_like(loss)
    torch.testing.assert_close(*(torch.autograd.grad(one, hidden, ones)[0] for one in (loss, expected)))


def reduced(losses: Tensor, divisor: Tensor | float, reduction: str) -> Tensor:
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / divisor}[reduction]


def targets_of(labels: Tensor, weights: Tensor) -> Tensor:
    """Return the dense targets [N, V] in which the weights of a class add up."""
    counted = labels != IGNORED
    return torch.zeros(len(labels), V, dtype=torch.float64).scatter_add_(1, labels * counted, weights * counted)


# Labels that a row lists twice


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_sigmoid_counts_a_class_once_however_often_a_row_lists_it(
    table: shardloss.Table, hidden: Tensor, labels: Tensor, reduction: str
) -> None:
    """Loss and gradient equal torch's binary cross-entropy with multi-hot labels; a row of padding has loss 0."""
    multi_hot = (targets_of(labels, torch.ones(N, T, dtype=torch.float64)) > 0).double()
    each = functional.binary_cross_entropy_with_logits(logits_of(table, hidden), multi_hot, reduction="none").sum(1)
    each = torch.where((labels == IGNORED).all(1), 0.0, each)
    assert_same(table.sigmoid(reduction=reduction)(hidden, labels), reduced(each, N - 1, reduction), hidden)


def test_a_sigmoid_loss_never_falls_below_zero(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """Sixty large steps on a row that lists its class twice approach 0, and the class is counted once a step."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D, count_labels=True)
    head, ones = table.sigmoid(learning_rate=1.0), torch.ones(1, D, requires_grad=True)
    losses = []
    for _ in range(60):
        loss = head(ones, torch.tensor([[3, 3]]))
        loss.backward()
        losses.append(float(loss))
    assert min(losses) >= 0
    assert losses[-1] < losses[0] / 50
    learned = table.read_class_counts(0, V).learned
    assert learned is not None
    assert learned[3] == 1 + 60


@pytest.mark.parametrize(
    ("row", "weights", "place"),
    [([3, 8, 3], [1.0, 0.5, 0.5], "1, 0"), ([3, 8, 5], [0.0, 1.5, 0.0], "1, 1"), ([8, 3, 3], [0.2, 1.0, 1.0], "1, 1")],
)
def test_sigmoid_targets_above_one_are_refused_by_row_and_column(
    table: shardloss.Table, hidden: Tensor, row: list[int], weights: list[float], place: str
) -> None:
    """The weights of a class in a row add up to its target; padding does not count, and nothing is committed."""
    labels, given = torch.tensor([[0, 0, IGNORED], row]), torch.tensor([[0.5, 0.5, 9.0], weights])
    head = table.sigmoid(learning_rate=0.1)
    with pytest.raises(InvalidArgument, match=rf"label_weights\[{place}\] = (1\.5|2\.0) is above 1") as refused:
        head(hidden[:2], labels, given)
    assert (refused.value.field, refused.value.index) == ("label_weights", place)
    assert head(hidden[:1], labels[:1], given[:1]) >= 0
    assert table.info().num_commits == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sigmoid_weights_are_targets(table: shardloss.Table, hidden: Tensor, labels: Tensor, reduction: str) -> None:
    """Weights that add up to a target in [0, 1] equal torch's loss, and "mean" divides by the rows that count."""
    weights = torch.rand(N, T, dtype=torch.float64) / T
    weights[4] = 0.0
    each = functional.binary_cross_entropy_with_logits(
        logits_of(table, hidden), targets_of(labels, weights), reduction="none"
    ).sum(1)
    each = torch.where(((labels == IGNORED) | (weights == 0)).all(1), 0.0, each)
    loss = table.sigmoid(reduction=reduction)(hidden, labels, weights)
    assert_same(loss, reduced(each, N - 2, reduction), hidden)


def test_a_softmax_gives_a_repeated_label_its_share(table: shardloss.Table, hidden: Tensor, labels: Tensor) -> None:
    """Loss and gradient equal torch's with a target of the labels' shares."""
    counted = (labels != IGNORED).double()
    shares = counted / counted.sum(1, keepdim=True).clamp(min=1)
    expected = functional.cross_entropy(logits_of(table, hidden), targets_of(labels, shares), reduction="none")
    assert_same(table.softmax(reduction="none")(hidden, labels), expected, hidden)


@pytest.mark.parametrize("kind", ["nce", "sampled_softmax"])
def test_a_sampled_loss_has_a_column_for_each_listing(table: shardloss.Table, hidden: Tensor, kind: str) -> None:
    """As in TensorFlow, labels 3, 3 are two columns with target 1/2 each, and the loss is not below 0."""
    sampled, count, drawn = torch.tensor([1, 6]), torch.full((N, 2), 0.5), torch.tensor([0.25, 2.0])
    labels = torch.full((N, 2), 3)
    true, others = logits_of(table, hidden)[:, [3, 3]] - count.log(), logits_of(table, hidden)[:, sampled] - drawn.log()
    columns = torch.cat([true, others], 1)
    if kind == "nce":
        expected = functional.softplus(columns).sum(1) - true.mean(1)
    else:
        expected = columns.logsumexp(1) - true.mean(1)
    loss = getattr(table, kind)(reduction="none")(hidden, labels, (sampled, count, drawn))
    assert_same(loss, expected, hidden)
    assert (loss >= 0).all()


# Weights under every reduction


@pytest.mark.parametrize(("smoothing", "reduction"), list(product((0.0, 0.2), REDUCTIONS)))
@pytest.mark.parametrize("by_class", [False, True], ids=["label weights", "and class weights"])
def test_weights_divide_a_softmax_mean_as_torchs_do(
    table: shardloss.Table, hidden: Tensor, smoothing: float, reduction: str, by_class: bool
) -> None:
    """Weights are torch's class weights of each row's own class; 0 leaves a row out, and padding has none."""
    labels = torch.tensor([0, 1, 2, 3, 4, IGNORED, 6])
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 7.0, 3.0], dtype=torch.float64)
    of_class = torch.rand(V, dtype=torch.float64) + 0.5
    logits = logits_of(table, hidden)
    if smoothing:  # class weights alone: they weigh the smoothing too
        head, given = (
            table.softmax(class_weights=of_class.numpy(), label_smoothing=smoothing, reduction=reduction),
            None,
        )
        torchs = of_class
    elif by_class:
        head, given = table.softmax(class_weights=of_class.numpy(), reduction=reduction), weights
        torchs = of_class * torch.cat([weights.where(labels != IGNORED, 1.0), torch.ones(V - N)])
    else:
        head, given = table.softmax(reduction=reduction), weights
        torchs = torch.cat([weights, torch.ones(V - N, dtype=torch.float64)])
    options = {"label_smoothing": smoothing, "reduction": reduction}
    expected = functional.cross_entropy(logits, labels, torchs, **options)
    assert_same(head(hidden, labels, given), expected, hidden)


def test_equal_weights_leave_a_mean_as_it_is(table: shardloss.Table, hidden: Tensor, labels: Tensor) -> None:
    """Weights of 2 / T for every label give the mean without weights, if no row has padding."""
    labels = labels.clamp(min=0)
    given = torch.full((N, T), 2.0 / T, dtype=torch.float64)
    head = table.softmax()
    assert_same(head(hidden, labels, given), head(hidden, labels), hidden)


def test_rows_of_weight_zero_are_left_out(table: shardloss.Table) -> None:
    """The mean over 20 rows of which 10 weigh 0 is the mean over the other 10."""
    hidden, labels = torch.randn(20, D, dtype=torch.float64, requires_grad=True), torch.randint(V, (20,))
    weights = (torch.arange(20) % 2).double()
    head = table.softmax()
    assert_same(head(hidden, labels, weights), head(hidden[1::2], labels[1::2]), hidden)


@pytest.mark.parametrize("weighted", ["softmax", "sigmoid", "class weights"])
def test_a_mean_of_nothing_is_nan(table: shardloss.Table, hidden: Tensor, weighted: str) -> None:
    """If all weights are 0, the mean is nan with gradient 0, as torch's is nan."""
    labels, none = torch.arange(N), torch.zeros(N, dtype=torch.float64)
    if weighted == "class weights":
        loss = table.softmax(class_weights=np.zeros(V))(hidden, labels)
    else:
        loss = getattr(table, weighted)()(hidden, labels, none)
    assert torch.isnan(loss)
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_a_distribution_divides_by_the_number_of_rows(table: shardloss.Table, hidden: Tensor) -> None:
    """As in torch, whatever the rows of the distribution add up to."""
    labels = torch.rand(N, V, dtype=torch.float64)
    labels[2] = 0.0
    assert_same(table.softmax()(hidden, labels), functional.cross_entropy(logits_of(table, hidden), labels), hidden)
