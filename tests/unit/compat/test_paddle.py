"""compat.paddle over dense tensors: cases that the golden files lack, against written-out formulas and torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from shardloss import sampling
from shardloss.compat import paddle
from shardloss.errors import InvalidArgument, NotSupported
from torch import Tensor

N, V, S = 5, 7, 3  # all different and odd, so that no two axes can be confused
F = torch.nn.functional


def logits_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels_of(*shape: int) -> Tensor:
    return torch.randint(0, V, shape)


def soft_of(*shape: int) -> Tensor:
    return logits_of(*shape).softmax(-1)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_axis_gives_what_the_last_one_gives(axis: int, soft: bool, weighted: bool, smoothing: float) -> None:
    """Moving the class axis of logits and labels moves the same axis of the losses and leaves their mean unchanged."""
    logits, weight = logits_of(N, S, V), torch.rand(V).double() if weighted else None
    label = soft_of(N, S, V) if soft else labels_of(N, S, 1)
    options = {"weight": weight, "soft_label": soft, "label_smoothing": smoothing}
    for reduction in ("none", "mean"):
        last = paddle.cross_entropy(logits, label, reduction=reduction, **options)
        moved = paddle.cross_entropy(
            logits.movedim(-1, axis), label.movedim(-1, axis), axis=axis, reduction=reduction, **options
        )
        expected = last.movedim(-1, axis) if reduction == "none" else last
        torch.testing.assert_close(moved, expected, rtol=1e-13, atol=1e-13)


def test_smoothing_and_weights_of_an_inner_axis_are_those_of_its_classes() -> None:
    """On axis 1 of [N, V, S] smoothing spreads over V classes and weights are [V]; Paddle 3.3.1 uses S for both."""
    logits, weight, e = logits_of(N, V, S), torch.rand(V).double(), 0.3
    soft, hard = logits_of(N, V, S).softmax(1), labels_of(N, S)
    log_p = logits.log_softmax(1)
    for label in (soft, F.one_hot(hard, V).double().movedim(-1, 1)):
        smooth = (1 - e) * label + e / V
        each, factors = -(smooth * log_p).sum(1, keepdim=True), (smooth * weight[:, None]).sum(1, keepdim=True)
        given = {"label_smoothing": e, "axis": 1}
        for form in (label, hard) if label is not soft else (label,):
            found = paddle.cross_entropy(logits, form, reduction="none", **given)
            torch.testing.assert_close(found, each)
            found = paddle.cross_entropy(logits, form, weight, reduction="none", **given)
            torch.testing.assert_close(found, each * factors)
            torch.testing.assert_close(
                paddle.cross_entropy(logits, form, weight, **given), (each * factors).sum() / factors.sum()
            )
    each, factors = -(soft * log_p).sum(1, keepdim=True), (soft * weight[:, None]).sum(1, keepdim=True)
    found = paddle.cross_entropy(logits, soft, weight, soft_label=True, axis=1, reduction="none")
    torch.testing.assert_close(found, each * factors)


def test_weights_multiply_the_loss_of_a_soft_label_by_their_mean_under_it() -> None:
    """loss[n] = sum(weight * label[n]) * CE(label[n]), and "mean" divides by the sum of the factors."""
    logits, label, weight = logits_of(N, V), soft_of(N, V), torch.rand(V).double()
    factors = (label * weight).sum(1)
    each = -(label * logits.log_softmax(1)).sum(1) * factors
    none, total, mean = (
        paddle.cross_entropy(logits, label, weight, soft_label=True, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(none, each[:, None])
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / factors.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_smoothed_class_id_is_its_smoothed_one_hot_label(weighted: bool, reduction: str) -> None:
    """Hard labels, [N] or [N, 1], and one-hot floats, with or without soft_label, give one loss."""
    logits, label = logits_of(N, V), labels_of(N)
    weight = torch.rand(V).double() if weighted else None
    options = {"weight": weight, "label_smoothing": 0.2, "reduction": reduction}
    one_hot = F.one_hot(label, V).double()
    explicit = paddle.cross_entropy(logits, 0.8 * one_hot + 0.2 / V, weight, soft_label=True, reduction=reduction)
    for given, soft in ((label, False), (label[:, None], False), (one_hot, False), (one_hot, True)):
        loss = paddle.cross_entropy(logits, given, soft_label=soft, **options)
        torch.testing.assert_close(loss, explicit, rtol=1e-13, atol=1e-13)


def test_the_mean_counts_all_rows_unless_ignore_index_is_a_class() -> None:
    """The mean divides by N if ignore_index < 0 and by the counted rows if it is >= 0, as in Paddle; 0 / 0 is 0."""
    logits, label = logits_of(N, V), torch.tensor([1, 2, -100, 2, 3])
    each = paddle.cross_entropy(logits, label, reduction="none")
    assert each[2] == 0
    assert paddle.cross_entropy(logits, label) == each.sum() / N
    counted = label.clamp(min=0)
    some = paddle.cross_entropy(logits, counted, ignore_index=2)
    torch.testing.assert_close(some, F.cross_entropy(logits, counted, ignore_index=2))
    assert paddle.cross_entropy(logits, torch.full((N,), 2), ignore_index=2) == 0
    assert paddle.cross_entropy(logits[:0], label[:0]).isnan()


def test_the_weighted_mean_divides_by_the_weights_of_the_rows_that_count() -> None:
    """The weighted mean equals torch's; if the weights sum to 0, the loss is 0."""
    logits, label, weight = logits_of(N, V), torch.tensor([1, 2, -100, 2, 3]), torch.rand(V).double()
    torch.testing.assert_close(paddle.cross_entropy(logits, label, weight), F.cross_entropy(logits, label, weight))
    assert paddle.cross_entropy(logits, label, torch.zeros(V).double()) == 0


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_unreduced_losses_have_the_labels_shape(shape: tuple[int, ...]) -> None:
    """cross_entropy keeps the labels' shape; softmax_with_cross_entropy always has size 1 on the class axis."""
    logits, label = logits_of(N, V), labels_of(*shape)
    assert paddle.cross_entropy(logits, label, reduction="none").shape == shape
    assert paddle.softmax_with_cross_entropy(logits, label).shape == (N, 1)
    assert paddle.softmax_with_cross_entropy(logits[0], label.reshape(-1)[:1]).shape == (1,)


def test_probabilities_of_zero_do_no_harm_where_they_do_not_count() -> None:
    """A probability of 0 gives finite losses and gradients in an ignored row and for a class with soft label 0."""
    probs = torch.eye(V, dtype=torch.float64)[:N].requires_grad_()
    label = torch.tensor([0, 1, -100, 3, 4])
    loss = paddle.cross_entropy(probs, label, use_softmax=False, reduction="none")
    assert loss.tolist() == [0.0] * N
    (gradient,) = torch.autograd.grad(loss.sum(), probs)
    assert gradient[2].tolist() == [0.0] * V
    assert gradient.isfinite().all()
    soft = paddle.cross_entropy(probs, torch.eye(V).double()[:N], soft_label=True, use_softmax=False)
    assert soft == 0
    assert torch.autograd.grad(soft, probs)[0].isfinite().all()
    masked = logits_of(N, V).index_fill(1, torch.tensor([6]), float("-inf")).requires_grad_()
    soft = paddle.cross_entropy(masked, F.one_hot(labels_of(N) % 6, V).double(), soft_label=True)
    assert soft.isfinite()
    assert torch.autograd.grad(soft, masked)[0].isfinite().all()


def test_the_gradient_of_soft_labels_is_softmax_minus_label() -> None:
    """The gradient is g * (softmax - label), as in Paddle, even if a row does not sum to 1; a row of zeros gets 0."""
    label = torch.rand(N, V, dtype=torch.float64)
    label[2] = 0
    logits = logits_of(N, V).requires_grad_()
    g = torch.rand(N, dtype=torch.float64)
    loss = paddle.softmax_with_cross_entropy(logits, label, soft_label=True)[:, 0]
    torch.testing.assert_close(loss, -(label * logits.log_softmax(-1)).sum(-1))
    (gradient,) = torch.autograd.grad(loss, logits, g)
    expected = g[:, None] * (logits.softmax(-1) - label)
    expected[2] = 0
    torch.testing.assert_close(gradient, expected)
    label = label.softmax(-1)
    assert torch.autograd.gradcheck(lambda z: paddle.softmax_with_cross_entropy(z, label, soft_label=True), logits)


# Sampled softmax


def test_every_class_as_a_sample_is_the_full_softmax() -> None:
    """Sampling every class, with Q = 1 and hits removed, gives the full softmax loss."""
    logits, label = logits_of(N, V), labels_of(N, 1)
    samples = torch.cat([label, torch.arange(V).expand(N, V)], 1)
    loss = paddle.sampled_softmax_with_cross_entropy(
        logits, label, V, 1, True, True, samples, torch.ones(N, V + 1, dtype=torch.float64)
    )
    torch.testing.assert_close(loss[:, 0], F.cross_entropy(logits, label[:, 0], reduction="none"))


def test_a_seed_draws_the_same_and_seed_0_draws_by_torchs_generator() -> None:
    """Equal seeds draw equal samples; seed 0 draws new ones each time, reproducible with torch.manual_seed."""
    logits, label = logits_of(N, 50), labels_of(N, 2)
    one, two, three = (paddle.sampled_softmax_with_cross_entropy(logits, label, S, 2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.manual_seed(3)
    random = [paddle.sampled_softmax_with_cross_entropy(logits, label, S, 2) for _ in range(2)]
    torch.manual_seed(3)
    again = [paddle.sampled_softmax_with_cross_entropy(logits, label, S, 2) for _ in range(2)]
    assert not torch.equal(*random)
    assert torch.equal(torch.stack(random), torch.stack(again))


def test_the_draw_is_that_of_the_samplers() -> None:
    """The samples are shardloss.sampling's distinct log-uniform draw of (seed, step 0), with its expected counts."""
    logits, label = logits_of(N, 50), labels_of(N, 1)
    zipf = sampling.log_uniform(50)
    drawn = sampling.draw(zipf, S, True, 9, 0)
    samples = torch.cat([label, torch.from_numpy(drawn.sampled).expand(N, S)], 1)
    counts = sampling.expected_count(zipf, samples.numpy(), S, True, drawn.num_tries)
    expected = paddle.sampled_softmax_with_cross_entropy(
        logits, label, S, 1, True, True, samples, torch.from_numpy(counts)
    )
    assert torch.equal(paddle.sampled_softmax_with_cross_entropy(logits, label, S, seed=9), expected)


# Margins


@pytest.mark.parametrize("margins", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.35), (1.35, 0.0, 0.0), (0.9, 0.4, 0.15)])
def test_the_gradient_of_a_margin_is_that_of_the_loss(margins: tuple[float, float, float]) -> None:
    """The gradient of a margin loss agrees with finite differences."""
    cosines = (torch.rand(N, V, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    label = labels_of(N)
    assert torch.autograd.gradcheck(lambda c: paddle.margin_cross_entropy(c, label, *margins, scale=4.0), cosines)


@pytest.mark.parametrize("cosine", [-1.0, 1.0, 1.0 + 1e-7])
def test_the_gradient_of_a_margin_stays_finite_at_the_poles(cosine: float) -> None:
    """Gradients are finite where the angle has no derivative, and if rounding put a cosine outside [-1, 1]."""
    cosines = torch.full((1, V), cosine, dtype=torch.float64).requires_grad_()
    loss = paddle.margin_cross_entropy(cosines, torch.tensor([2]))
    loss.backward()
    assert loss.isfinite()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", None])
def test_margin_reductions(reduction: str | None) -> None:
    """Without margins and at scale 1 the loss is the cross entropy of the cosines; labels may be [N] or [N, 1]."""
    cosines, label = torch.rand(N, V, dtype=torch.float64), labels_of(N)
    expected = F.cross_entropy(cosines, label, reduction=reduction or "none")
    for given in (label, label[:, None]):
        loss = paddle.margin_cross_entropy(cosines, given, 1.0, 0.0, 0.0, 1.0, reduction=reduction)
        assert loss.shape == ((N, 1) if reduction in (None, "none") else ())
        torch.testing.assert_close(loss.reshape(expected.shape), expected)


# Class centers


def test_class_centers_come_from_torchs_generator() -> None:
    """torch.manual_seed determines the negatives; the labels always come first."""
    label = torch.tensor([40, 3, 3, 17])
    torch.manual_seed(1)
    first, second = (paddle.class_center_sample(label, 1000, 20)[1] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(paddle.class_center_sample(label, 1000, 20)[1], first)
    assert not torch.equal(first, second)
    assert first[:3].tolist() == second[:3].tolist() == [3, 17, 40]
    remapped, centers = paddle.class_center_sample(label.int(), 1000, 2)
    assert centers.tolist() == [3, 17, 40]
    assert remapped.dtype == torch.int32
    assert remapped.tolist() == [2, 0, 0, 1]


# Refusals

Call = Callable[[], object]
L, Y, SOFT = torch.zeros(N, V), torch.zeros(N, dtype=torch.int64), torch.full((N, V), 1 / V)
Y1 = Y[:, None]
COLUMNS = torch.zeros(N, 1 + S, dtype=torch.int64)
Q = torch.ones(N, 1 + S)
sampled = paddle.sampled_softmax_with_cross_entropy
BAD: list[tuple[str | None, Call]] = [
    ("logits", lambda: paddle.softmax_with_cross_entropy(Y1, Y1)),
    ("logits", lambda: paddle.softmax_with_cross_entropy(torch.tensor(1.0), Y)),
    ("input", lambda: paddle.cross_entropy([[1.0]], Y)),  # type: ignore[arg-type]
    ("axis", lambda: paddle.softmax_with_cross_entropy(L, Y1, axis=2)),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1.float() + 0.5)),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1 * float("nan"))),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1.expand(N, 2))),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1 - 1)),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1 + V)),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y1, soft_label=True)),
    ("label", lambda: paddle.softmax_with_cross_entropy(L, L.long(), soft_label=True)),
    ("reduction", lambda: paddle.cross_entropy(L, Y, reduction="average")),
    ("label", lambda: paddle.cross_entropy(L, Y.numpy())),  # type: ignore[arg-type]
    ("label", lambda: paddle.softmax_with_cross_entropy(L, Y.tolist())),  # type: ignore[arg-type]
    ("label", lambda: paddle.softmax_with_cross_entropy(L, L.numpy(), soft_label=True)),  # type: ignore[arg-type]
    ("label", lambda: paddle.margin_cross_entropy(L, Y.numpy())),  # type: ignore[arg-type]
    ("weight", lambda: paddle.cross_entropy(L, Y, np.ones(V))),  # type: ignore[arg-type]
    ("weight", lambda: paddle.cross_entropy(L, Y, torch.ones(V + 1))),
    ("weight", lambda: paddle.cross_entropy(L, Y, torch.ones(V, dtype=torch.int64))),
    ("label_smoothing", lambda: paddle.cross_entropy(L, Y, label_smoothing=1.5)),
    ("ignore_index", lambda: paddle.cross_entropy(L, SOFT, soft_label=True, ignore_index=1)),
    ("ignore_index", lambda: paddle.cross_entropy(L, Y, label_smoothing=0.1, ignore_index=0)),
    ("label", lambda: paddle.cross_entropy(L, Y - 100, label_smoothing=0.1)),
    ("label", lambda: sampled(L, Y1, S, num_true=2)),
    ("label", lambda: sampled(L[None], Y1, S)),
    ("label", lambda: sampled(L, Y1 - 1, S)),
    ("num_samples", lambda: sampled(L, Y1, V + 1)),
    ("num_samples", lambda: sampled(L, Y1, 0)),
    ("num_samples", lambda: sampled(torch.zeros(1, 300_000), Y1[:1], 299_999)),
    ("seed", lambda: sampled(L, Y1, S, seed=-1)),
    ("customized_samples", lambda: sampled(L, Y1, S, use_customized_samples=True)),
    ("customized_probabilities", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS)),
    ("customized_samples", lambda: sampled(L, Y1, S + 1, 1, True, True, COLUMNS, Q)),
    ("customized_samples", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS + 1, Q)),
    ("customized_samples", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS - 1, Q)),
    ("customized_samples", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS.double(), Q)),
    ("customized_probabilities", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS, Q[:, :S])),
    ("customized_probabilities", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS, Q * 0)),
    ("customized_probabilities", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS, Q.long())),
    ("customized_probabilities", lambda: sampled(L, Y1, S, 1, True, True, COLUMNS, Q.numpy())),  # type: ignore[arg-type]
    ("label", lambda: sampled(L, Y1.numpy(), S)),  # type: ignore[arg-type]
    ("label", lambda: paddle.class_center_sample(Y.numpy(), V, S)),  # type: ignore[arg-type]
    ("reduction", lambda: paddle.margin_cross_entropy(L, Y, reduction="average")),
    ("label", lambda: paddle.margin_cross_entropy(L, Y - 100)),
    ("label", lambda: paddle.class_center_sample(Y1, V, S)),
    ("label", lambda: paddle.class_center_sample(Y[:0], V, S)),
    ("label", lambda: paddle.class_center_sample(Y + V, V, S)),
    ("label", lambda: paddle.class_center_sample(Y - 1, V, S)),
    ("label", lambda: paddle.class_center_sample(Y.float(), V, S)),
    ("num_samples", lambda: paddle.class_center_sample(Y, V, V + 1)),
    ("num_samples", lambda: paddle.class_center_sample(Y, V, 0)),
]


@pytest.mark.parametrize("field, call", BAD)
def test_what_does_not_fit_is_refused_by_its_field(field: str | None, call: Call) -> None:
    """InvalidArgument names the argument, instead of a wrong result or an error from torch."""
    with pytest.raises(InvalidArgument) as refusal:
        call()
    assert refusal.value.field == field


def test_a_bad_label_is_named_by_its_place() -> None:
    """The error gives the label's index in the shape that the caller passed."""
    with pytest.raises(InvalidArgument, match=r"label\[3\] = 7 is outside \[0, 7\)"):
        paddle.cross_entropy(L, torch.tensor([0, 1, 2, 7, 9]))


def test_a_bad_probability_is_named_by_its_place() -> None:
    """The error names the first bad probability by its row and column."""
    wrong = Q.clone()
    wrong[2, 1] = float("inf")
    with pytest.raises(InvalidArgument, match=r"customized_probabilities\[2, 1\] = inf must be finite and > 0"):
        sampled(L, Y1, S, 1, True, True, COLUMNS, wrong)


class Ranks:
    """A group of ranks, as Paddle recognises one."""

    def is_member(self) -> bool:
        return True


@pytest.mark.parametrize(
    "error, group", [(NotSupported, Ranks()), (InvalidArgument, True), (InvalidArgument, 0), (InvalidArgument, "ranks")]
)
def test_a_group_of_ranks_is_refused(error: type[Exception], group: object) -> None:
    """A group of ranks raises NotSupported, and what is none InvalidArgument; None and False mean a single process."""
    for call in (
        lambda: paddle.margin_cross_entropy(L, Y, group=group),
        lambda: paddle.class_center_sample(Y, V, S, group),
    ):
        with pytest.raises(error, match="group") as refused:
            call()
        assert refused.value.field == "group"  # type: ignore[attr-defined]
    paddle.class_center_sample(Y, V, S, False)
