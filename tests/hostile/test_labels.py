"""A label is a class id or the caller's ignore_index: no other value has a meaning, whatever the code marks inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shardloss
import torch
from shardloss.compat import paddle, tensorflow
from shardloss.errors import InvalidArgument
from torch import Tensor

V, D, N = 11, 5, 4
OUTSIDE = [-1, -2, -100, V, 2**31, -(2**31), 2**63 - 1, -(2**63)]
HIDDEN = torch.linspace(-1.0, 1.0, N * D).reshape(N, D)
Tables = tuple[shardloss.Table, shardloss.Table]
Loss = Callable[[Tables, Tensor], object]


@pytest.fixture
def tables(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Tables:
    """A table with biases that counts its labels, and one without biases."""
    spec: dict[str, Any] = {"num_classes": V, "dim": D, "num_shards": 2, "count_labels": True}
    return client.create_table(fresh_name(), **spec), client.create_table(fresh_name(), bias=False, **spec)


def labels_with(label: int) -> Tensor:
    """Return labels [N], of which the third is the one given."""
    return torch.tensor([0, 3, label, 5])


def values(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([1, 3]), torch.ones(len(labels), 1), torch.ones(2)


TENSORFLOW: dict[str, Loss] = {
    "sampled_softmax_loss": lambda t, y: tensorflow.sampled_softmax_loss(t[0], t[0], y[:, None], HIDDEN, 3, V),
    "sampled_softmax_loss of values": lambda t, y: tensorflow.sampled_softmax_loss(
        t[0], t[0], y[:, None], HIDDEN, 2, V, sampled_values=values(y)
    ),
    "nce_loss": lambda t, y: tensorflow.nce_loss(t[0], t[0], y[:, None], HIDDEN, 3, V),
    "v1.sampled_softmax_loss": lambda t, y: tensorflow.v1.sampled_softmax_loss(t[0], t[0], y[:, None], HIDDEN, 3, V),
    "v1.nce_loss": lambda t, y: tensorflow.v1.nce_loss(t[0], t[0], y[:, None], HIDDEN, 3, V),
    "full_softmax_loss": lambda t, y: tensorflow.full_softmax_loss(t[0], t[0], y, HIDDEN),
    "full_sigmoid_loss": lambda t, y: tensorflow.full_sigmoid_loss(t[0], t[0], y, HIDDEN),
}
PADDLE: dict[str, Loss] = {
    "margin_cross_entropy": lambda t, y: paddle.margin_cross_entropy(t[1].logits(HIDDEN), y),
    "dense margin_cross_entropy": lambda _, y: paddle.margin_cross_entropy(torch.zeros(N, V), y),
    "smoothed cross_entropy": lambda t, y: paddle.cross_entropy(t[0].logits(HIDDEN), y, label_smoothing=0.1),
    "sampled": lambda t, y: paddle.sampled_softmax_with_cross_entropy(t[0].logits(HIDDEN), y[:, None], 3),
    "class_center_sample": lambda _, y: paddle.class_center_sample(y, V, 7),
}
IGNORING: dict[str, Loss] = {  # losses whose ignore_index is -100 unless another is passed
    "cross_entropy": lambda t, y: paddle.cross_entropy(t[0].logits(HIDDEN), y),
    "dense cross_entropy": lambda _, y: paddle.cross_entropy(torch.zeros(N, V), y),
    "softmax_with_cross_entropy": lambda t, y: paddle.softmax_with_cross_entropy(t[0].logits(HIDDEN), y),
    "softmax": lambda t, y: t[0].softmax()(HIDDEN, y),
    "weighted softmax": lambda t, y: t[0].softmax(class_weights=torch.ones(V))(HIDDEN, y),
    "sampled_softmax": lambda t, y: t[0].sampled_softmax(3)(HIDDEN, y),
    "sampled_softmax of values": lambda t, y: t[0].sampled_softmax(3)(HIDDEN, y[:, None], values(y)),
    "in batch": lambda t, y: t[0].sampled_softmax(sampler=shardloss.InBatch())(HIDDEN, y),
    "nce": lambda t, y: t[0].nce(3)(HIDDEN, y),
    "sigmoid": lambda t, y: t[0].sigmoid()(HIDDEN, y),
    "margin_softmax": lambda t, y: t[1].margin_softmax()(HIDDEN, y),
    "evaluate": lambda t, y: t[0].evaluate(HIDDEN.numpy(), y.numpy()),
    "sampling_gap": lambda t, y: t[0].sampling_gap(HIDDEN.numpy(), y.numpy(), shardloss.SampledSoftmax(3)),
}


def refusal(tables: Tables, loss: Loss, label: int) -> InvalidArgument:
    """Return the error of a loss whose third label is given; it changes nothing."""
    with pytest.raises(InvalidArgument) as refused:
        loss(tables, labels_with(label))
    assert (refused.value.field, refused.value.index) in (
        (field, index) for field in ("labels", "label") for index in ("2", "2, 0")
    )
    assert f"= {label} is outside [0, {V})" in refused.value.message
    assert [(table.info().version, table.info().num_open_tickets) for table in tables] == [(0, 0), (0, 0)]
    return refused.value


@pytest.mark.parametrize("name", [*TENSORFLOW, *PADDLE])
def test_a_loss_without_ignore_index_refuses_every_label_that_is_no_class(tables: Tables, name: str) -> None:
    """No private mark can be passed as a label, and the message does not name an argument that the loss lacks."""
    for label in OUTSIDE:
        assert "ignore_index" not in refusal(tables, {**TENSORFLOW, **PADDLE}[name], label).message


@pytest.mark.parametrize("name", IGNORING)
def test_a_loss_with_ignore_index_names_it_for_a_label_that_is_no_class(tables: Tables, name: str) -> None:
    """Only ignore_index, -100 by default, is left out; the message says so and gives the value in force."""
    for label in OUTSIDE:
        if label != -100:
            assert "ignore_index (now -100)" in refusal(tables, IGNORING[name], label).message


@pytest.mark.parametrize("ignored", [None, 5, -2])
def test_another_ignore_index_leaves_out_no_other_label(tables: Tables, ignored: int | None) -> None:
    """-100 and -1 are ordinary bad labels if ignore_index is something else or None."""
    heads: list[Loss] = [
        lambda t, y: t[0].softmax(ignore_index=ignored)(HIDDEN, y),
        lambda t, y: t[0].nce(3, ignore_index=ignored)(HIDDEN, y),
        lambda t, y: t[0].evaluate(HIDDEN.numpy(), y.numpy(), ignore_index=ignored),
        lambda t, y: t[0].compute_loss(HIDDEN.numpy(), y.numpy(), shardloss.FullSigmoid(), ignore_index=ignored),
    ]
    now = "ignore_index" if ignored is None else f"ignore_index (now {ignored})"
    for head in heads:
        for label in (-1, -100, V, -(2**63)):
            assert now in refusal(tables, head, label).message


@pytest.mark.parametrize("ignored", [-1, -2, 3, V + 5, 2**63 - 1, -(2**63)])
def test_any_ignore_index_leaves_out_its_own_labels(tables: Tables, ignored: int) -> None:
    """Also the values that the code uses as marks are what the caller says: the row has loss and gradient 0."""
    hidden, labels = HIDDEN.clone().requires_grad_(), labels_with(ignored)
    for head in (
        tables[0].softmax(reduction="none", ignore_index=ignored),
        tables[0].sampled_softmax(3, reduction="none", ignore_index=ignored),
        tables[0].sigmoid(reduction="none", ignore_index=ignored),
        tables[1].margin_softmax(reduction="none", ignore_index=ignored),
    ):
        losses = head(hidden, labels)
        assert (losses != 0).tolist() == (labels != ignored).tolist()
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        assert gradient[2].tolist() == [0.0] * D
    found = tables[0].evaluate(HIDDEN.numpy(), labels.numpy(), ignore_index=ignored)
    assert found.counted is not None
    assert found.counted.tolist() == (labels != ignored).tolist()


@pytest.mark.parametrize("ignored", [-1, 3, V + 5, -(2**31)])
def test_paddles_ignore_index_leaves_out_its_own_labels(tables: Tables, ignored: int) -> None:
    labels = labels_with(ignored)
    for logits in (tables[0].logits(HIDDEN), torch.zeros(N, V)):
        with torch.no_grad():
            losses = paddle.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")
        assert (losses != 0).tolist() == (labels != ignored).tolist()


def test_a_label_that_is_left_out_is_not_counted(tables: Tables) -> None:
    """A table that counts its labels counts none for an ignored row, whatever marks it."""
    optimizer = paddle.optimizer(tables[0], lr=0.1)
    labels = torch.tensor([0, 3, -1, 3])
    paddle.cross_entropy(tables[0].logits(HIDDEN.clone().requires_grad_()), labels, ignore_index=-1).backward()
    optimizer.step()
    counts = tables[0].read_class_counts(0, V).learned
    assert counts is not None
    np.testing.assert_array_equal(counts - 1, np.bincount([0, 3, 3], minlength=V))


@pytest.mark.parametrize("value", [-100.0, float("nan"), True, "x", [1], 2**63, -(2**63) - 1])
def test_an_ignore_index_is_an_integer_of_64_bits(tables: Tables, value: Any) -> None:
    """Anything else is refused by name: True would be class 1."""
    table, labels = tables[0], labels_with(1)
    for call in (
        lambda: table.softmax(ignore_index=value),
        lambda: table.evaluate(HIDDEN.numpy(), labels.numpy(), ignore_index=value),
        lambda: table.compute_loss(HIDDEN.numpy(), labels.numpy(), shardloss.FullSoftmax(), ignore_index=value),
    ):
        with pytest.raises(InvalidArgument, match="ignore_index") as refused:
            call()
        assert refused.value.field == "ignore_index"


def test_an_ignore_index_may_be_an_integer_of_numpy_or_torch(tables: Tables) -> None:
    for value in (np.int64(-100), torch.tensor(-100)):
        found = tables[0].evaluate(HIDDEN.numpy(), labels_with(-100).numpy(), ignore_index=value)  # type: ignore[arg-type]
        assert found.counted is not None
        assert found.counted.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    "field, given",
    [("num_sampled", {"num_sampled": value}) for value in (None, 5.0, "5", True, 2**63)]
    + [("seed", {"num_sampled": 3, "seed": value}) for value in (1.5, "a", -1, 2**64, False)],
)
def test_a_draw_is_described_by_integers(tables: Tables, field: str, given: Any) -> None:
    """A head names the argument when it is created, before any loss."""
    for make in (tables[0].sampled_softmax, tables[0].nce):
        with pytest.raises(InvalidArgument, match=field) as refused:
            make(**given)
        assert refused.value.field == field
