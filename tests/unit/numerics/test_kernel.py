"""Losses, gradients and steps of a sharded table equal autograd of the slow, obvious reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from shardloss_server.frontend.request import SampledSoftmax, SampledValues
from shardloss_server.numerics import kernel, reference
from shardloss_server.numerics.margin import Margin, with_margin
from shardloss_server.numerics.partial import Partial
from torch import Tensor

V, D, N = 211, 5, 7  # V is prime: its three shards have 71, 70 and 70 rows; D and N are no multiple of a vector width
TOLERANCE = 1e-12
LEARNING_RATE = 0.3
MakeCut = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """A batch for a loss: labels are -1 if ignored; sampled None is the full softmax."""

    hidden: Tensor
    labels: Tensor
    label_weights: Tensor | None = None
    sampled: SampledSoftmax | None = None

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the same batch with hidden in another dtype."""
        return replace(self, hidden=self.hidden.to(dtype))

    def arguments(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "labels": self.labels,
            "label_weights": self.label_weights,
            "sampled": self.sampled,
        }


def table(num_classes: int = V, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(num_classes, D, dtype=torch.float64), torch.randn(num_classes, dtype=torch.float64)


def hidden(num_rows: int = N) -> Tensor:
    return torch.randn(num_rows, D, dtype=torch.float64)


# The oracle


def reference_loss(weights: Tensor, biases: Tensor, batch: Batch) -> Tensor:
    """Return per-example losses [N] of `numerics.reference` in the given dtype; a row without a label has loss 0."""
    if batch.sampled is not None:
        return sampled_reference(weights, biases, batch)
    label_weights = batch.label_weights
    if label_weights is None:
        label_weights = torch.ones(batch.labels.shape, dtype=weights.dtype)
        label_weights = label_weights / (batch.labels >= 0).sum(1, keepdim=True).clamp(min=1)
    label_weights = torch.where(batch.labels >= 0, label_weights.to(weights.dtype), 0.0)
    return reference.full_softmax(weights, biases, batch.hidden, batch.labels, label_weights)


def sampled_reference(weights: Tensor, biases: Tensor, batch: Batch) -> Tensor:
    """Compute the loss row by row, with only that row's labels, because the reference does not support padding."""
    assert batch.sampled is not None
    draw = batch.sampled.candidates
    assert isinstance(draw, SampledValues)
    losses = []
    for row, labels, count in zip(batch.hidden, batch.labels, draw.true_expected_count.to(weights.dtype), strict=True):
        kept = labels >= 0
        loss = reference.sampled_softmax(
            weights,
            biases,
            row[None],
            labels[kept][None],
            draw.sampled,
            count[kept][None],
            draw.sampled_expected_count.to(weights.dtype),
            batch.sampled.hit_removal,
        )
        losses.append(loss[0] if kept.any() else 0.0 * row.sum())
    return torch.stack(losses)


@dataclass(frozen=True)
class Expected:
    """Losses [N], d sum(loss) / d hidden [N, D], and d sum(g loss) / d weights [V, D] and biases [V]."""

    loss: Tensor
    hidden_grad: Tensor
    weights_grad: Tensor
    biases_grad: Tensor


def autograd(weights: Tensor, biases: Tensor, batch: Batch, g: Tensor) -> Expected:
    weights, biases, rows = (x.clone().requires_grad_() for x in (weights, biases, batch.hidden))
    loss = reference_loss(weights, biases, replace(batch, hidden=rows))
    (hidden_grad,) = torch.autograd.grad(loss.sum(), rows, retain_graph=True)
    table_grads = torch.autograd.grad((g * loss).sum(), (weights, biases))
    return Expected(loss.detach(), hidden_grad, *table_grads)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality to within 1e-12 of the largest magnitude."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


# Batches


def full_batches() -> dict[str, Batch]:
    labels = torch.randint(0, V, (N, 3))
    padded = labels.clone()
    padded[1, 2] = padded[3, 0] = padded[3, 1] = -1
    padded[5] = -1
    twice = labels.clone()
    twice[:, 2] = twice[:, 0]
    weighted = torch.rand(N, 3, dtype=torch.float64) * 2  # row sums differ from 1
    weighted[2, 1] = 0.0
    weighted[4] = 0.0
    ignored = labels[:, :1].clone()
    ignored[[0, 4]] = -1
    return {
        "one label": Batch(hidden(), labels[:, :1]),
        "ignored rows": Batch(hidden(), ignored),
        "three labels": Batch(hidden(), labels),
        "padded labels": Batch(hidden(), padded),
        "a label given twice": Batch(hidden(), twice),
        "weighted labels": Batch(hidden(), labels, weighted),
        "weighted and padded labels": Batch(hidden(), padded, weighted),
        "labels of one class": Batch(hidden(), torch.full((N, 2), V - 1)),
        "one row": Batch(hidden(1), labels[:1]),
    }


def sampled_batches() -> dict[str, Batch]:
    """Return batches whose hit_removal each test sets. Copies of an id differ in Q, so it matters which copy stays."""
    distinct = torch.randperm(V)[:23]
    repeats = torch.randint(0, 9, (23,))  # 23 draws of 9 ids: every id has copies
    labels = torch.randint(0, 12, (N, 3))  # close to the repeated ids: most labels are hits, some never are
    padded = labels.clone()
    padded[1, 2] = padded[3, 0] = padded[3, 1] = -1
    padded[5] = -1
    twice = labels.clone()
    twice[:, 2] = twice[:, 0]
    return {
        "a distinct draw": sampled(labels[:, :1], distinct),
        "repeats in the draw": sampled(labels[:, :1], repeats),
        "three labels": sampled(labels, repeats),
        "a label given twice": sampled(twice, repeats),
        "padded labels": sampled(padded, repeats),
        "a label sampled three times": sampled(torch.full((N, 1), 8), torch.tensor([8, 3, 8, 200, 8])),
        "every candidate is a hit": sampled(torch.full((N, 1), 100), torch.full((4,), 100)),
        "one candidate": sampled(labels[:, :1], torch.tensor([V - 1])),
        "no candidate": sampled(labels, torch.zeros(0, dtype=torch.int64)),
        "more draws than classes": sampled(labels, torch.randint(0, V, (2 * V,))),
    }


def sampled(labels: Tensor, ids: Tensor, hit_removal: str = "every") -> Batch:
    """Return a batch with the given draw and random expected counts between 1e-3 and 3."""
    true_count, count = (torch.empty(shape, dtype=torch.float64) for shape in (labels.shape, ids.shape))
    for x in (true_count, count):
        x.uniform_(-3, 0.5)
    values = SampledValues(ids, 10**true_count, 10**count)
    return Batch(hidden(), labels, None, SampledSoftmax(values, hit_removal))


FULL = list(full_batches())
SAMPLED = list(sampled_batches())


def batch_of(name: str, hit_removal: str | None) -> Batch:
    if hit_removal is None:
        return full_batches()[name]
    batch = sampled_batches()[name]
    assert batch.sampled is not None
    return replace(batch, sampled=replace(batch.sampled, hit_removal=hit_removal))


every_batch = pytest.mark.parametrize(
    "name, hit_removal",
    [(name, None) for name in FULL] + [(name, mode) for name in SAMPLED for mode in ("none", "every", "last")],
)


# float64


@every_batch
@pytest.mark.parametrize("strategy", ["div", "mod"])
def test_losses_and_gradients_equal_autograd(
    make_cut: MakeCut, name: str, hit_removal: str | None, strategy: str
) -> None:
    """Per-example loss, gradient of hidden and gradient of the table equal the reference's to 1e-12."""
    weights, biases = table()
    batch = batch_of(name, hit_removal)
    g = torch.randn(len(batch.hidden), dtype=torch.float64)
    expected = autograd(weights, biases, batch, g)
    cut = make_cut(weights, biases, num_shards=3, strategy=strategy)
    part = cut.plan(**batch.arguments())
    answer = cut.score(part)
    weights_grad, biases_grad = cut.gradient(part, g)
    assert_close(answer.loss, expected.loss)
    assert_close(answer.hidden_grad, expected.hidden_grad)
    assert_close(weights_grad, expected.weights_grad)
    assert_close(biases_grad, expected.biases_grad)


@every_batch
def test_a_commit_subtracts_the_scaled_gradient(make_cut: MakeCut, name: str, hit_removal: str | None) -> None:
    """One step of plain SGD leaves table - learning rate * d sum(g loss) / d table."""
    weights, biases = table()
    batch = batch_of(name, hit_removal)
    g = torch.randn(len(batch.hidden), dtype=torch.float64)
    expected = autograd(weights, biases, batch, g)
    cut = make_cut(weights, biases, num_shards=3)
    cut.apply([cut.plan(**batch.arguments())], [g], LEARNING_RATE)
    new_weights, new_biases = cut.read()
    assert_close(new_weights, weights - LEARNING_RATE * expected.weights_grad)
    assert_close(new_biases, biases - LEARNING_RATE * expected.biases_grad)


def test_a_commit_of_several_parts_is_one_step_over_their_sum(make_cut: MakeCut) -> None:
    """Full and sampled parts, each with its own g, make one step with the sum of their gradients, row by row."""
    weights, biases = table()
    batches = [batch_of("three labels", None), batch_of("three labels", "every"), batch_of("padded labels", None)]
    gs = [torch.randn(N, dtype=torch.float64) for _ in batches]
    grads = [autograd(weights, biases, batch, g) for batch, g in zip(batches, gs, strict=True)]
    cut = make_cut(weights, biases, num_shards=3)
    cut.apply([cut.plan(**batch.arguments()) for batch in batches], gs, LEARNING_RATE)
    new_weights, new_biases = cut.read()
    assert_close(new_weights, weights - LEARNING_RATE * sum(grad.weights_grad for grad in grads))
    assert_close(new_biases, biases - LEARNING_RATE * sum(grad.biases_grad for grad in grads))


@pytest.mark.parametrize("hit_removal", [None, "every"])
def test_a_table_without_biases_has_none_and_learns_none(make_cut: MakeCut, hit_removal: str | None) -> None:
    """Scores are those of zero biases, and a commit leaves the biases at 0."""
    weights, _ = table()
    batch = batch_of("three labels", hit_removal)
    g = torch.randn(N, dtype=torch.float64)
    expected = autograd(weights, torch.zeros(V, dtype=torch.float64), batch, g)
    cut = make_cut(weights, None, num_shards=3)
    part = cut.plan(**batch.arguments())
    assert_close(cut.score(part).loss, expected.loss)
    cut.apply([part], [g], LEARNING_RATE)
    new_weights, new_biases = cut.read()
    assert_close(new_weights, weights - LEARNING_RATE * expected.weights_grad)
    assert not new_biases.any()


@pytest.mark.parametrize("hit_removal", [None, "none", "every", "last"])
def test_gradients_are_slopes_of_the_loss(make_cut: MakeCut, hit_removal: str | None) -> None:
    """Central differences of the served loss along random directions agree with the served gradients."""
    weights, biases = table()
    batch = batch_of("padded labels", hit_removal)
    g = torch.randn(N, dtype=torch.float64)
    cut = make_cut(weights, biases, num_shards=3)
    part = cut.plan(**batch.arguments())
    hidden_grad = g[:, None] * cut.score(part).hidden_grad
    weights_grad, biases_grad = cut.gradient(part, g)
    eps = 1e-5  # error eps^2 + rounding / eps: about 1e-10

    def loss_at(step: float, d_hidden: Tensor, d_weights: Tensor, d_biases: Tensor) -> float:
        cut.write(weights + step * d_weights, biases + step * d_biases)
        moved = cut.plan(**replace(batch, hidden=batch.hidden + step * d_hidden).arguments())
        return float((g * cut.score(moved).loss).sum())

    for _ in range(3):
        directions = torch.randn_like(batch.hidden), torch.randn_like(weights), torch.randn_like(biases)
        slope = (loss_at(eps, *directions) - loss_at(-eps, *directions)) / (2 * eps)
        served = sum((a * b).sum() for a, b in zip((hidden_grad, weights_grad, biases_grad), directions, strict=True))
        assert slope == pytest.approx(float(served), rel=1e-7, abs=1e-7)


# float32


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("hit_removal", [None, "every"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_float32_is_as_exact_as_the_naive_float32(make_cut: MakeCut, hit_removal: str | None, scale: float) -> None:
    """A float32 table's error against float64 is at most twice that of autograd of the reference in float32.

    Errors are root mean squares over 40 batches, because single roundings may fall either way. The factor of two allows
    for the roundings that merging K = 3 shards adds.
    """
    ours: dict[str, list[Tensor]] = {name: [] for name in ("loss", "hidden_grad", "weights_grad", "biases_grad")}
    naive: dict[str, list[Tensor]] = {name: [] for name in ours}
    for _ in range(40):
        weights, biases = (x.float() for x in table(scale=scale))
        batch = batch_of("three labels", hit_removal).to(torch.float32)
        g = torch.randn(N)
        exact = autograd(weights.double(), biases.double(), batch.to(torch.float64), g.double())
        plain = autograd(weights, biases, batch, g)
        cut = make_cut(weights, biases, num_shards=3, dtype="float32")
        part = cut.plan(**batch.arguments())
        answer, table_grad = cut.score(part), cut.gradient(part, g)
        served = Expected(answer.loss, answer.hidden_grad, *table_grad)
        for result, errors in ((served, ours), (plain, naive)):
            for name, values in errors.items():
                values.append(getattr(result, name).double() - getattr(exact, name))
    ratios = {name: rms(torch.stack(values)) / rms(torch.stack(naive[name])) for name, values in ours.items()}
    assert max(ratios.values()) <= 2, ratios


# The edges


@pytest.mark.parametrize("hit_removal", [None, "every"])
@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_large_logits_stay_finite_and_right(make_cut: MakeCut, hit_removal: str | None, scale: float) -> None:
    """Logits of hundreds and of 1e4, far outside exp's range, give the reference's losses and gradients."""
    weights, biases = table(scale=scale)
    batch = batch_of("three labels", hit_removal)
    g = torch.randn(N, dtype=torch.float64)
    expected = autograd(weights, biases, batch, g)
    cut = make_cut(weights, biases, num_shards=3)
    part = cut.plan(**batch.arguments())
    answer, (weights_grad, biases_grad) = cut.score(part), cut.gradient(part, g)
    assert expected.loss.max() > scale / 3  # the loss is as large as the case's name says
    assert_close(answer.loss, expected.loss)
    # a probability is exp of a difference of logits: its relative error is the difference's absolute error
    for actual, wanted in ((answer.hidden_grad, expected.hidden_grad), (weights_grad, expected.weights_grad)):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE * scale * float(wanted.abs().max()))
    torch.testing.assert_close(biases_grad, expected.biases_grad, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("hit_removal", [None, "every"])
def test_an_empty_batch_is_legal(make_cut: MakeCut, hit_removal: str | None) -> None:
    """N = 0 gives no losses and no gradient, and its commit changes no row."""
    weights, biases = table()
    cut = make_cut(weights, biases, num_shards=3)
    batch = batch_of("three labels", hit_removal)
    draw = batch.sampled
    if draw is not None:
        draw = replace(draw, candidates=replace(draw.candidates, true_expected_count=torch.zeros(0, 3).double()))
    part = cut.plan(hidden=batch.hidden[:0], labels=batch.labels[:0], sampled=draw)
    answer = cut.score(part)
    assert answer.loss.shape == (0,)
    assert answer.hidden_grad.shape == (0, D)
    g = torch.zeros(0, dtype=torch.float64)
    assert not any(grad.any() for grad in cut.gradient(part, g))
    cut.apply([part], [g], LEARNING_RATE)
    new_weights, new_biases = cut.read()
    assert torch.equal(new_weights, weights)
    assert torch.equal(new_biases, biases)


@pytest.mark.parametrize(
    "hit_removal, by", [(None, "ignored labels"), (None, "zero weights"), ("every", "ignored labels")]
)
def test_a_batch_without_a_label_costs_nothing(make_cut: MakeCut, hit_removal: str | None, by: str) -> None:
    """If all rows are ignored, losses and gradients are 0, not nan, and the table is unchanged."""
    weights, biases = table()
    batch = batch_of("three labels", hit_removal)
    if by == "ignored labels":
        batch = replace(batch, labels=torch.full((N, 3), -1))
    else:
        batch = replace(batch, label_weights=torch.zeros(N, 3))
    g = torch.randn(N, dtype=torch.float64)
    cut = make_cut(weights, biases, num_shards=3)
    part = cut.plan(**batch.arguments())
    answer = cut.score(part)
    assert not answer.loss.any()
    assert not answer.hidden_grad.any()
    cut.apply([part], [g], LEARNING_RATE)
    assert torch.equal(cut.read()[0], weights)
    assert torch.equal(cut.read()[1], biases)


@pytest.mark.parametrize("hit_removal", [None, "every"])
def test_an_ignored_row_contributes_nothing_whatever_its_hidden(make_cut: MakeCut, hit_removal: str | None) -> None:
    """An ignored row of arbitrary finite values, whose logits overflow float32, changes no loss and no gradient."""
    weights, biases = (x.float() for x in table())
    clean = batch_of("three labels", hit_removal).to(torch.float32)
    clean.labels[2] = -1
    g = torch.randn(N)
    garbage = replace(clean, hidden=clean.hidden.clone())
    garbage.hidden[2] = torch.finfo(torch.float32).max
    cut = make_cut(weights, biases, num_shards=3, dtype="float32")
    expected, part = cut.plan(**clean.arguments()), cut.plan(**garbage.arguments())
    torch.testing.assert_close(cut.score(part).loss, cut.score(expected).loss)
    torch.testing.assert_close(cut.score(part).hidden_grad, cut.score(expected).hidden_grad)
    for actual, wanted in zip(cut.gradient(part, g), cut.gradient(expected, g), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_float32_probabilities_sum_to_one_at_logits_of_hundreds(make_cut: MakeCut) -> None:
    """Probabilities sum to 1 within 1e-6, the error of float32 logits; an lse stored in float32 would be off by 1.5e-5.

    The sum is read from the gradients of the biases, p - y, for one row at a time.
    """
    weights, biases = (x.float() for x in table(num_classes=2011, scale=0.3))
    batch = batch_of("one label", None).to(torch.float32)
    cut = make_cut(weights, biases + 300, num_shards=3, dtype="float32")
    part = cut.plan(**batch.arguments())
    for g in torch.eye(N):
        assert cut.gradient(part, g)[1].double().sum().abs() < 1e-6


def test_a_label_without_weight_may_have_a_logit_below_every_number(make_cut: MakeCut) -> None:
    """A label of weight 0 adds 0 to the loss, even if float32 turns its logit of -3e39 into -inf."""
    weights, biases = (x.float() for x in table(num_classes=11))
    weights[3] = -3e38
    batch = Batch(torch.full((2, D), 10.0), torch.tensor([[5, 3], [3, 7]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    without = replace(batch, labels=torch.tensor([[5], [7]]), label_weights=None)
    cut = make_cut(weights, biases, num_shards=3, dtype="float32")
    loss, expected = (cut.score(cut.plan(**asked.arguments())).loss for asked in (batch, without))
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(loss, expected)


def test_softplus_is_exact_where_it_is_nearly_its_argument() -> None:
    """log(1 + exp(z)) = z + log1p(exp(-z)) for any z, including those above torch's threshold of 20."""
    logits = torch.tensor([-800.0, -30.0, 0.0, 19.9, 20.1, 25.0, 30.0, 800.0], dtype=torch.float64)
    exact = logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))
    torch.testing.assert_close(kernel.softplus(logits), exact, rtol=2.0**-52, atol=0)


@pytest.mark.parametrize("margin", [Margin(1.0, 0.5, 0.0), Margin(1.35, 0.0, 0.1), Margin(0.9, 0.4, 0.15)])
def test_a_cosine_that_rounding_puts_beyond_1_has_no_slope(margin: Margin) -> None:
    """Margins and their slopes equal autograd of the reference; a cosine beyond +-1 is clamped and has slope 0."""
    scale = 16.0
    logits = scale * torch.tensor([-1.0 - 1e-9, -0.999, -0.3, 0.0, 0.7, 0.999, 1.0 + 1e-9], dtype=torch.float64)
    wanted = reference.with_margin(logits.requires_grad_(), margin, scale)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), logits)
    wanted_slope = torch.where(logits.abs() > scale, 0.0, wanted_slope)  # the clamp's slope; acos gives inf * 0 there
    moved, slope = with_margin(logits.detach(), margin, scale)
    torch.testing.assert_close(moved, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_add_up_to_one_softmax(dtype: torch.dtype) -> None:
    """Any split of the columns gives the same sums, with rising or falling maxima, rows of -inf or empty blocks.

    The sums can also continue from a partial.
    """
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=generator, dtype=dtype) * 20
    logits[1] = -torch.inf
    logits[2, :30] = -torch.inf
    logits[3] = logits[3].sort().values
    rows, pull = torch.randn(40, 3, generator=generator, dtype=dtype), torch.randn(5, 40, generator=generator).double()
    lse = logits.double().logsumexp(1)
    share = torch.exp(logits.double() - torch.where(torch.isneginf(lse), 0.0, lse)[:, None])
    for cuts in ([40], [7, 0, 20, 13], [1] * 40):
        sums = kernel.SoftmaxSums(Partial.empty(5, 3, dtype, True, True), dtype)
        start = 0
        for size in cuts:
            block = slice(start, start + size)
            sums.add_(kernel.Columns(logits[:, block].clone(), None, pull[:, block]), rows[block])
            start += size
        found = sums.partial()
        twice = kernel.SoftmaxSums(found, dtype)
        twice.add_(kernel.Columns(logits[:, :9].clone(), None, pull[:, :9]), rows[:9])
        tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-13}
        torch.testing.assert_close(found.lse, lse, **tolerance)
        torch.testing.assert_close(found.mean_row.double(), share @ rows.double(), **tolerance)
        torch.testing.assert_close(found.mean_pull, (share * pull).sum(1), **tolerance)
        both = torch.cat([logits, logits[:, :9]], 1).double().logsumexp(1)
        torch.testing.assert_close(twice.partial().lse, both, **tolerance)
