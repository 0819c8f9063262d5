"""compat.paddle over a remote table's logits trains as a local dense torch loop does, without storing [N, V] logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES, batches, encoder
from shardloss import LogitTransform
from shardloss.compat import paddle
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.lazy import LazyLogits
from torch import Tensor

from ..extent import scaled

STEPS = scaled(20, 60)
LEARNING_RATE = 0.2
Make = Callable[..., shardloss.Table]
Loss = Callable[["Tensor | LazyLogits", Tensor], Tensor]
F = torch.nn.functional


@pytest.fixture
def make_table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Make:
    def make(num_classes: int = NUM_CLASSES, **options: object) -> shardloss.Table:
        options = {"dtype": "float64", "num_shards": 3, "bias": False} | options
        return client.create_table(fresh_name(), num_classes=num_classes, dim=DIM, **options)

    return make


def rows_of(table: shardloss.Table) -> tuple[Tensor, Tensor]:
    """Return rows [V, D] and biases [V]; the biases are 0 if the table has none."""
    rows = table.read_rows(np.arange(table.spec.num_classes))
    biases = np.zeros(len(rows.rows)) if rows.biases is None else rows.biases
    return torch.tensor(rows.rows), torch.tensor(biases)


def soft_of(labels: Tensor) -> Tensor:
    """Return soft labels [N, V] that depend on the class ids [N]."""
    return F.one_hot(labels, NUM_CLASSES).double() * 0.7 + 0.3 / NUM_CLASSES


def columns_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's label and its 6 own samples [N, 1 + 6], some of them hits, and the Q of each."""
    samples = (labels[:, None] * 3 + torch.arange(7)) % NUM_CLASSES
    samples[:, 0] = labels
    return samples, 0.1 + samples.double() / NUM_CLASSES


WEIGHT = torch.linspace(0.5, 2.0, NUM_CLASSES, dtype=torch.float64)

# name, loss of compat.paddle, loss of torch alone (from logits [N, V])
LOOPS: list[tuple[str, Loss, Loss]] = [
    ("cross_entropy", paddle.cross_entropy, F.cross_entropy),
    (
        "weighted",
        lambda z, y: paddle.cross_entropy(z, y, WEIGHT, ignore_index=4),
        lambda z, y: F.cross_entropy(z, y, WEIGHT, ignore_index=4),
    ),
    (
        "smoothed",
        lambda z, y: paddle.cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
    ),
    (
        "soft",
        lambda z, y: paddle.softmax_with_cross_entropy(z, soft_of(y), soft_label=True).mean(),
        lambda z, y: F.cross_entropy(z, soft_of(y)),
    ),
    (
        "sampled",
        lambda z, y: paddle.sampled_softmax_with_cross_entropy(z, y[:, None], 6, 1, True, True, *columns_of(y)).mean(),
        lambda z, y: paddle.sampled_softmax_with_cross_entropy(z, y[:, None], 6, 1, True, True, *columns_of(y)).mean(),
    ),
    ("margin", lambda z, y: paddle.margin_cross_entropy(z, y, scale=4.0), lambda z, y: arcface(z, y, 4.0)),
]


def arcface(cosines: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Return the mean loss with an additive angular margin of 0.5, by torch alone."""
    moved = torch.cos(torch.acos(cosines) + 0.5)
    is_label = F.one_hot(labels, cosines.shape[1]).bool()
    return F.cross_entropy(scale * torch.where(is_label, moved, cosines), labels)


@pytest.mark.parametrize(("name", "remote", "local"), LOOPS, ids=[loop[0] for loop in LOOPS])
def test_a_loop_over_a_table_is_the_loop_over_a_local_weight(
    make_table: Make, name: str, remote: Loss, local: Loss
) -> None:
    """The losses, rows and encoder agree to 1e-9 over all steps of SGD."""
    table = make_table(bias=name != "margin")
    normalize = name == "margin"
    transform = LogitTransform(normalize=True) if normalize else None
    net = encoder(torch.float64)
    twin = copy.deepcopy(net)
    weights, biases = (value.requires_grad_() for value in rows_of(table))
    optimizers = [paddle.optimizer(table, LEARNING_RATE), torch.optim.SGD(net.parameters(), 0.1)]
    local_optimizers = [
        torch.optim.SGD([weights, biases][: 1 if normalize else 2], LEARNING_RATE),
        torch.optim.SGD(twin.parameters(), 0.1),
    ]
    for features, labels in batches(STEPS, torch.float64):
        ours = remote(table.logits(net(features), transform), labels)
        hidden, rows = twin(features), weights
        if normalize:
            hidden, rows = F.normalize(hidden, dim=-1), F.normalize(rows, dim=-1)
        theirs = local(hidden @ rows.T + biases, labels)
        for loss, group in ((ours, optimizers), (theirs, local_optimizers)):
            for optimizer in group:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in group:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert table.info().num_commits == STEPS
    for ours, theirs in zip((*rows_of(table), net.weight), (weights, biases, twin.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, check_device=False)


def test_float32_losses_of_a_batch_of_sequences_are_those_of_the_dense_logits(make_table: Make) -> None:
    """hidden [B, L, D] with labels [B, L] or [B, L, 1] works in every function that takes more than two axes."""
    table = make_table(dtype="float32", bias=True)
    hidden, labels = torch.randn(2, 3, DIM), torch.randint(0, NUM_CLASSES, (2, 3))
    weights, biases = (value.float() for value in rows_of(table))
    lazy, dense = table.logits(hidden), hidden @ weights.T + biases
    for logits in (lazy, dense):
        assert paddle.cross_entropy(logits, labels, reduction="none").shape == (2, 3)
        assert paddle.cross_entropy(logits, labels[..., None], reduction="none").shape == (2, 3, 1)
        assert paddle.softmax_with_cross_entropy(logits, labels[..., None], axis=2).shape == (2, 3, 1)
    for options in ({}, {"weight": torch.rand(NUM_CLASSES)}, {"label_smoothing": 0.1}):
        ours, theirs = (paddle.cross_entropy(logits, labels, **options) for logits in (lazy, dense))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "transform",
    [LogitTransform(scale=0.5), LogitTransform(soft_cap=2.0), LogitTransform(scale=3.0, normalize=True)],
    ids=["scale", "cap", "cosine"],
)
def test_a_transform_makes_the_logits_of_every_loss(make_table: Make, transform: LogitTransform) -> None:
    """Scale, soft cap and cosines apply to the exact loss, the sampled loss and the probabilities."""
    table = make_table()
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    rows, dense = rows_of(table)[0], hidden
    if transform.normalize:
        rows, dense = F.normalize(rows, dim=-1), F.normalize(hidden, dim=-1)
    dense = transform.scale * dense @ rows.T
    if transform.soft_cap is not None:
        dense = transform.soft_cap * torch.tanh(dense / transform.soft_cap)
    lazy = table.logits(hidden, transform)
    for loss in (LOOPS[0][1], LOOPS[4][1]):
        torch.testing.assert_close(loss(lazy, labels), loss(dense, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lazy.probabilities([4, 0]), dense.softmax(-1)[:, [4, 0]], rtol=1e-12, atol=1e-12)


def test_probabilities_are_those_of_the_table_when_asked(make_table: Make) -> None:
    """Logits and softmax return the current probabilities of chosen classes, or of all classes in chunks."""
    table = make_table(bias=True)
    hidden, labels = torch.randn(2, 3, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (2, 3))
    weights, biases = rows_of(table)
    probs = (hidden @ weights.T + biases).softmax(-1)
    logits = table.logits(hidden)
    loss, softmax = paddle.softmax_with_cross_entropy(logits, labels, return_softmax=True)
    assert loss.shape == (2, 3, 1)
    for asked in (logits, softmax):
        assert asked.shape == (2, 3, NUM_CLASSES)
        assert asked.dim() == 3
        torch.testing.assert_close(asked.probabilities([4, 4, 0]), probs[..., [4, 4, 0]])
        torch.testing.assert_close(asked.probabilities(labels[..., None]), probs.gather(-1, labels[..., None]))
        for size in (1, 5, NUM_CLASSES, 100):
            chunks = list(asked.probability_chunks(size))
            assert [i for class_ids, _ in chunks for i in class_ids] == list(range(NUM_CLASSES))
            torch.testing.assert_close(torch.cat([chunk for _, chunk in chunks], -1), probs)
    table.write_rows(np.arange(NUM_CLASSES), np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES))
    torch.testing.assert_close(softmax.probabilities([3]), torch.full((2, 3, 1), 1 / NUM_CLASSES).double())


@pytest.mark.parametrize("normalize", [False, True])
def test_the_softmax_of_a_margin_is_asked_in_chunks(make_table: Make, normalize: bool) -> None:
    """The softmax is that of the scaled cosines with margin, for all classes in chunks and for chosen classes."""
    table = make_table()
    hidden, rows = F.normalize(torch.randn(BATCH, DIM, dtype=torch.float64), dim=-1) / 2, rows_of(table)[0]
    cosines = F.normalize(hidden, dim=-1) @ F.normalize(rows, dim=-1).T if normalize else hidden @ rows.T
    labels = torch.randint(0, NUM_CLASSES, (BATCH,))
    logits = table.logits(hidden, LogitTransform(normalize=normalize))
    _, dense = paddle.margin_cross_entropy(cosines, labels, scale=8.0, return_softmax=True)
    _, lazy = paddle.margin_cross_entropy(logits, labels, scale=8.0, return_softmax=True)
    torch.testing.assert_close(torch.cat([chunk for _, chunk in lazy.probability_chunks(5)], -1), dense)
    own = torch.stack([labels, (labels + 1) % NUM_CLASSES], 1)
    torch.testing.assert_close(lazy.probabilities(own), dense.gather(1, own))


def test_losses_of_a_step_are_one_commit(make_table: Make) -> None:
    """Losses of two functions and two micro-batches over one table are one step of its optimizer."""
    table = make_table(bias=True)
    weights, biases = (value.requires_grad_() for value in rows_of(table))
    optimizer = paddle.optimizer(table, 0.5)
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH,))
    paddle.cross_entropy(table.logits(hidden[:3]), labels[:3], reduction="sum").backward()
    paddle.softmax_with_cross_entropy(table.logits(hidden[3:]), labels[3:]).sum().backward()
    optimizer.step()
    assert table.info().num_commits == 1
    F.cross_entropy(hidden @ weights.T + biases, labels, reduction="sum").backward()
    torch.testing.assert_close(rows_of(table)[0], (weights - 0.5 * weights.grad).detach())


def test_under_no_grad_the_table_is_left_alone(make_table: Make) -> None:
    """A loss under no_grad opens no ticket, and the next step commits nothing."""
    table = make_table()
    optimizer = paddle.optimizer(table, 0.5)
    with torch.no_grad():
        paddle.cross_entropy(table.logits(torch.randn(2, DIM)), torch.tensor([0, 1]))
    optimizer.step()
    assert table.info().num_open_tickets == 0
    assert table.info().version == 0


def test_the_service_draws_where_samples_are_not_given(make_table: Make) -> None:
    """The losses of a step share one log-uniform draw of (seed, step); the next step has a new one."""
    table = make_table(bias=True)
    optimizer = paddle.optimizer(table, 0.0)
    hidden, labels = torch.randn(BATCH, DIM, dtype=torch.float64), torch.randint(0, NUM_CLASSES, (BATCH, 2))

    def loss(seed: int = 0) -> Tensor:
        return paddle.sampled_softmax_with_cross_entropy(table.logits(hidden), labels, 6, 2, seed=seed)

    first, second = loss(), loss()
    assert first.shape == (BATCH, 1)
    assert torch.equal(first, second)
    drawn = table.sample_candidates(6, seed=9, step=1, labels=labels.numpy())
    samples = torch.cat([labels, torch.tensor(drawn.sampled).expand(BATCH, 6)], 1)
    counts = torch.cat(
        [torch.tensor(drawn.true_expected_count), torch.tensor(drawn.sampled_expected_count).expand(BATCH, 6)], 1
    )
    given = paddle.sampled_softmax_with_cross_entropy(table.logits(hidden), labels, 6, 2, True, True, samples, counts)
    torch.testing.assert_close(loss(seed=9), given)
    first.sum().backward()
    optimizer.step()
    assert not torch.equal(loss(), first)


# Refusals


@pytest.mark.parametrize(
    "call",
    [
        np.asarray,
        np.exp,
        torch.as_tensor,
        lambda z: torch.softmax(z, -1),
        lambda z: F.cross_entropy(z, torch.tensor([0])),
        lambda z: z * 2.0,
        lambda z: 2.0 / z,
        lambda z: torch.ones(1) + z,
        lambda z: z @ torch.ones(3, 3),
        lambda z: z[0],
        list,
        float,
        lambda z: z > 0,
    ],
)
def test_what_would_hold_all_logits_is_refused_by_name(make_table: Make, call: Callable[[object], object]) -> None:
    """An operation that would materialise all logits raises NotSupported, and the message names probability_chunks."""
    logits = make_table().logits(torch.randn(2, DIM))
    with pytest.raises(NotSupported, match=r"probability_chunks\(size\)"):
        call(logits)


def test_a_tensors_methods_are_missing_with_a_hint(make_table: Make) -> None:
    """A missing tensor method raises AttributeError with a hint, so hasattr is False for it."""
    logits = make_table().logits(torch.randn(2, DIM))
    with pytest.raises(AttributeError, match="probabilities"):
        logits.softmax(-1)  # type: ignore[attr-defined]
    assert not hasattr(logits, "numpy")
    assert repr(logits) == f"LazyLogits(shape=[2, {NUM_CLASSES}])"


@pytest.mark.parametrize("hidden", [torch.zeros(2, DIM + 1), torch.zeros(2, DIM).long(), torch.tensor(1.0), [[0.0]]])
def test_hidden_that_does_not_fit_is_refused(make_table: Make, hidden: Tensor) -> None:
    """InvalidArgument names hidden if its width, dtype, rank or type is wrong; nothing is sent."""
    with pytest.raises(InvalidArgument) as refusal:
        make_table().logits(hidden)
    assert refusal.value.field == "hidden"


LABEL = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (NotSupported, lambda z: paddle.softmax_with_cross_entropy(z, LABEL, axis=0)),
        (InvalidArgument, lambda z: paddle.softmax_with_cross_entropy(z, LABEL, axis=2)),
        (NotSupported, lambda z: paddle.cross_entropy(z, LABEL, use_softmax=False)),
        (InvalidArgument, lambda z: paddle.margin_cross_entropy(z, LABEL, group=True)),
        (InvalidArgument, lambda z: paddle.sampled_softmax_with_cross_entropy(z, LABEL[:, None], NUM_CLASSES + 1)),
        (InvalidArgument, lambda z: paddle.cross_entropy(z, LABEL + NUM_CLASSES)),
        (InvalidArgument, lambda z: paddle.margin_cross_entropy(z, LABEL, scale=0.0)),
        (InvalidArgument, lambda z: z.probabilities([NUM_CLASSES])),
        (InvalidArgument, lambda z: z.probabilities([0.5])),
        (InvalidArgument, lambda z: z.probabilities(torch.zeros(3, 1, dtype=torch.int64))),
        (InvalidArgument, lambda z: list(z.probability_chunks(0))),
    ],
)
def test_what_lazy_logits_cannot_do_is_a_named_error(
    make_table: Make, error: type[Exception], call: Callable[[LazyLogits], object]
) -> None:
    """A call that lazy logits do not support raises NotSupported or InvalidArgument, and the table is unchanged."""
    table = make_table()
    with pytest.raises(error):
        call(table.logits(torch.randn(2, DIM)))
    assert table.info().version == 0


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 1025], ids=["labels", "a distribution"])
def test_soft_labels_that_do_not_sum_to_1_have_paddles_gradient(make_table: Make, num_classes: int) -> None:
    """The logits' gradient is softmax - label over lazy and dense logits alike, and 0 for a label row of zeros."""
    table = make_table(num_classes=num_classes)
    weights = rows_of(table)[0].requires_grad_()
    label = torch.rand(4, num_classes, dtype=torch.float64)
    label[1] = 0
    hidden = torch.randn(4, DIM, dtype=torch.float64, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()
    g = torch.rand(4, 1, dtype=torch.float64)
    losses = paddle.softmax_with_cross_entropy(table.logits(hidden), label, soft_label=True)
    expected = paddle.softmax_with_cross_entropy(twin @ weights.T, label, soft_label=True)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    losses.backward(g)
    expected.backward(g)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-11, atol=1e-12)
    paddle.optimizer(table, lr=0.5).step()
    assert weights.grad is not None
    torch.testing.assert_close(rows_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=1e-11, atol=1e-12)


def test_soft_labels_of_more_classes_than_a_row_has_labels_stream(make_table: Make) -> None:
    """Above max_num_true classes they are sent as a label distribution; loss, gradient and step are the same."""
    num_classes = 1025
    table = make_table(num_classes=num_classes)
    rows, _ = rows_of(table)
    label = torch.rand(2, num_classes, dtype=torch.float64).softmax(-1)
    hidden = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()
    weights = rows.clone().requires_grad_()
    losses = paddle.softmax_with_cross_entropy(table.logits(hidden), label, soft_label=True)
    expected = paddle.softmax_with_cross_entropy(twin @ weights.T, label, soft_label=True)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-12, atol=1e-12)
    paddle.optimizer(table, lr=0.5).step()
    assert weights.grad is not None
    torch.testing.assert_close(rows_of(table)[0], (weights - 0.5 * weights.grad).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", [LogitTransform(scale=2.0), LogitTransform(soft_cap=3.0)])
def test_a_margin_takes_cosines_alone(make_table: Make, transform: LogitTransform) -> None:
    """Logits with a scale, a soft cap or biases are not cosines, and a margin over them raises InvalidArgument."""
    with pytest.raises(InvalidArgument, match="not cosines"):
        paddle.margin_cross_entropy(make_table().logits(torch.randn(2, DIM), transform), LABEL)
    with pytest.raises(InvalidArgument, match="bias=False"):
        paddle.margin_cross_entropy(make_table(bias=True).logits(torch.randn(2, DIM)), LABEL)
