"""A loss does not depend on the sharding of the table, the rest of the batch, or the chunk size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shardloss_server.frontend.request import SampledSoftmax, SampledValues, SamplerSpec
from shardloss_server.numerics import kernel, reference
from torch import Tensor

D = 5
TOLERANCE = 1e-12
MakeCut = Callable[..., Any]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a table and a batch: V below and above the shard counts, ignored labels, and every kind of candidates."""
    num_classes, num_rows, num_true = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(-1, num_classes, (num_rows, num_true), generator=generator)
    kind = draw(st.sampled_from(["full", "weighted", "none", "every", "last"]))
    batch: dict[str, Any] = {"hidden": randn(num_rows, D), "labels": labels}
    if kind == "weighted":
        batch["label_weights"] = randn(num_rows, num_true).abs()
    elif kind != "full":
        ids = torch.randint(0, num_classes, (draw(st.integers(0, 20)),), generator=generator)
        values = SampledValues(ids, randn(num_rows, num_true).exp(), randn(len(ids)).exp())
        batch["sampled"] = SampledSoftmax(values, kind)
    scale = draw(st.sampled_from([0.3, 3.0]))
    g = randn(num_rows)
    return {"weights": scale * randn(num_classes, D), "biases": randn(num_classes), "batch": batch, "g": g}


def answers(cut: Any, problem: dict[str, Any]) -> list[Tensor]:
    """Return the loss, hidden gradient, table gradient and the table after a commit."""
    part = cut.plan(**problem["batch"])
    answer = cut.score(part)
    out = [answer.loss, answer.hidden_grad, *cut.gradient(part, problem["g"])]
    cut.apply([part], [problem["g"]], 0.3)
    return [*out, *cut.read()]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE * 10)


@given(problems(), st.sampled_from([2, 3, 7]), st.sampled_from(["div", "mod"]))
@settings(max_examples=80)
def test_the_cut_of_the_table_does_not_show(
    make_cut: MakeCut, problem: dict[str, Any], num_shards: int, strategy: str
) -> None:
    """K shards, "div" or "mod", some of them empty, give the same losses, gradients and commits as one shard."""
    table = problem["weights"], problem["biases"]
    whole, cut = make_cut(*table, num_shards=1), make_cut(*table, num_shards=num_shards, strategy=strategy)
    assert_all_close(answers(cut, problem), answers(whole, problem))


@given(problems())
@settings(max_examples=50)
def test_a_row_does_not_feel_its_batch_companions(make_cut: MakeCut, problem: dict[str, Any]) -> None:
    """A row scored alone has the same loss and hidden gradient as in its batch."""
    cut = make_cut(problem["weights"], problem["biases"], num_shards=3)
    batch = problem["batch"]
    together = cut.score(cut.plan(**batch))
    for n in range(len(batch["hidden"])):
        row = {name: value[n : n + 1] for name, value in batch.items() if name != "sampled"}
        if "sampled" in batch:
            draw = batch["sampled"].candidates
            values = SampledValues(draw.sampled, draw.true_expected_count[n : n + 1], draw.sampled_expected_count)
            row["sampled"] = SampledSoftmax(values, batch["sampled"].hit_removal)
        alone = cut.score(cut.plan(**row))
        assert_all_close([alone.loss[0], alone.hidden_grad[0]], [together.loss[n], together.hidden_grad[n]])


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_permuting_rows_permutes_the_answers(make_cut: MakeCut, problem: dict[str, Any], random: Any) -> None:
    """Losses follow their rows, and the table's gradient does not depend on the order of rows."""
    cut = make_cut(problem["weights"], problem["biases"], num_shards=3)
    batch, g = problem["batch"], problem["g"]
    order = torch.tensor(random.sample(range(len(g)), len(g)))
    moved = {name: value[order] for name, value in batch.items() if name != "sampled"}
    if "sampled" in batch:
        draw = batch["sampled"].candidates
        values = SampledValues(draw.sampled, draw.true_expected_count[order], draw.sampled_expected_count)
        moved["sampled"] = SampledSoftmax(values, batch["sampled"].hit_removal)
    part, moved_part = cut.plan(**batch), cut.plan(**moved)
    assert_all_close([cut.score(moved_part).loss], [cut.score(part).loss[order]])
    assert_all_close([*cut.gradient(moved_part, g[order])], [*cut.gradient(part, g)])


@pytest.mark.parametrize("chunk_logits", [1, 7 * 64, 7 * 128, 1 << 30])
def test_the_size_of_the_chunks_does_not_show(
    make_cut: MakeCut, monkeypatch: pytest.MonkeyPatch, chunk_logits: int
) -> None:
    """A full softmax over 407 classes equals the reference in chunks of 64 and 128 rows and in one piece."""
    weights, biases = (torch.randn(407, D).double(), torch.randn(407).double())
    hidden, labels, g = torch.randn(7, D).double(), torch.randint(0, 407, (7, 2)), torch.randn(7).double()
    w, b, h = (x.clone().requires_grad_() for x in (weights, biases, hidden))
    loss = reference.full_softmax(w, b, h, labels, torch.full((7, 2), 0.5).double())
    (hidden_grad,) = torch.autograd.grad(loss.sum(), h, retain_graph=True)
    weights_grad, biases_grad = torch.autograd.grad((g * loss).sum(), (w, b))
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", chunk_logits)
    cut = make_cut(weights, biases, num_shards=3, strategy="mod")
    expected = [loss.detach(), hidden_grad, weights_grad, biases_grad]
    expected += [weights - 0.3 * weights_grad, biases - 0.3 * biases_grad]
    assert_all_close(answers(cut, {"batch": {"hidden": hidden, "labels": labels}, "g": g}), expected)


@pytest.mark.parametrize("hit_removal", ["none", "every", "last"])
def test_the_size_of_the_ranges_of_candidates_does_not_show(
    make_cut: MakeCut, monkeypatch: pytest.MonkeyPatch, hit_removal: str
) -> None:
    """A sampled loss with 400 draws and hits in every range is the same in ranges of 64 candidates as in one piece."""
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(0, 407, shape, generator=generator) for shape in ((400,), (7, 9)))
    values = SampledValues(ids, torch.rand(7, 9).double() + 0.1, torch.rand(400).double() + 0.1)
    batch = {"hidden": torch.randn(7, D).double(), "labels": labels, "sampled": SampledSoftmax(values, hit_removal)}
    problem, table = {"batch": batch, "g": torch.randn(7).double()}, (torch.randn(407, D).double(), torch.randn(407))
    whole = answers(make_cut(*table, num_shards=2), problem)
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 1)
    assert_all_close(answers(make_cut(*table, num_shards=2), problem), whole)


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_the_same_request_gives_the_same_bits(make_cut: MakeCut, kind: str) -> None:
    """With the same K, loss, gradients and the committed table repeat bit for bit, in float32 as well."""
    weights, biases = torch.randn(203, D), torch.randn(203)
    batch: dict[str, Any] = {"hidden": torch.randn(7, D), "labels": torch.randint(0, 203, (7, 2)), "step": 3}
    if kind == "sampled":
        batch["sampled"] = SampledSoftmax(SamplerSpec("log_uniform", 31, False, 5), "every")
    problem = {"batch": batch, "g": torch.randn(7)}
    once, again = (answers(make_cut(weights, biases, num_shards=3, dtype="float32"), problem) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("num_true", [1, 3])
def test_every_class_as_candidate_is_the_exact_softmax(make_cut: MakeCut, num_true: int) -> None:
    """A distinct uniform sample of all V classes gives the full softmax's loss and gradients.

    Its expected counts are equal for all classes and cancel; hit removal leaves each class in the lse exactly once.
    """
    num_classes = 41
    weights, biases = torch.randn(num_classes, D).double(), torch.randn(num_classes).double()
    labels = torch.stack([torch.randperm(num_classes)[:num_true] for _ in range(7)])  # distinct within a row
    batch = {"hidden": torch.randn(7, D).double(), "labels": labels}
    everything = SampledSoftmax(SamplerSpec("uniform", num_classes, True, 7), "every")
    exact, full = ({"batch": batch | extra, "g": torch.randn(7).double()} for extra in ({"sampled": everything}, {}))
    full["g"] = exact["g"]
    cuts = [make_cut(weights, biases, num_shards=3) for _ in range(2)]
    assert_all_close(answers(cuts[0], exact), answers(cuts[1], full))


def test_a_masked_candidate_has_no_probability_and_no_gradient(make_cut: MakeCut) -> None:
    """An accidental hit contributes neither to the loss of its row nor to the gradient of its class."""
    weights, biases = torch.randn(11, D).double(), torch.randn(11).double()
    hidden, labels = torch.randn(1, D).double(), torch.tensor([[4]])
    count = torch.full((1, 1), 0.5).double()

    def score(ids: list[int]) -> tuple[Tensor, Tensor]:
        values = SampledValues(torch.tensor(ids), count, torch.full((len(ids),), 0.25).double())
        cut = make_cut(weights, biases, num_shards=3)
        part = cut.plan(hidden, labels, sampled=SampledSoftmax(values, "every"))
        return cut.score(part).loss, cut.gradient(part, torch.ones(1))[0]

    assert_all_close([*score([4, 2, 4, 9])], [*score([2, 9])])


@given(st.integers(0, 2**32), st.sampled_from(["none", "every", "last"]))
@settings(max_examples=30)
def test_each_copy_of_a_candidate_counts(make_cut: MakeCut, seed: int, hit_removal: str) -> None:
    """An id drawn twice counts as two columns: probabilities of labels and candidates sum to 1, so dz sums to 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(11, D, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 11, (3, 2), generator=generator)
    ids = torch.randint(0, 5, (9,), generator=generator)
    values = SampledValues(ids, torch.rand(3, 2, generator=generator) + 0.1, torch.rand(9, generator=generator) + 0.1)
    cut = make_cut(weights, torch.zeros(11, dtype=torch.float64), num_shards=3)
    hidden = torch.randn(3, D, dtype=torch.float64, generator=generator)
    part = cut.plan(hidden, labels, sampled=SampledSoftmax(values, hit_removal))
    _, biases_grad = cut.gradient(part, torch.ones(3))
    assert float(biases_grad.sum()) == pytest.approx(0.0, abs=TOLERANCE)
