"""Top-k, rank and log-sum-exp are exact for any sharding and slicing, with ties broken by class id, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.evaluation.slices import best_of, merged_lse, sum_before
from shardloss_server.shard.scan import AskedLogits, Question, ScanAnswer
from torch import Tensor

from ...extent import sample, turn_of

V, D, N = 97, 5, 7  # V is prime: no shard count divides it
MakeCut = Callable[..., Any]
CUTS = [(3, "div", 40), (7, "mod", 2)]  # 40 slices of 32 rows: some are empty
CUTS += [(1, "div", 1), (1, "div", 4), (2, "div", 3), (2, "mod", 1), (3, "mod", 5), (7, "div", 1), (3, "div", 1)]
CUTS += [(1, "mod", 4), (7, "div", 2), (7, "mod", 1)]


def every_cut(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on two of the cuts, which depend on its name."""
    return pytest.mark.parametrize("num_shards, strategy, num_pieces", sample(CUTS, 2, turn_of(test.__name__)))(test)


every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


@dataclass(frozen=True)
class Table:
    """Rows and biases that any storage dtype represents exactly, with groups of equal rows all over the table."""

    weights: Tensor
    biases: Tensor
    hidden: Tensor

    def order(self, row: int) -> list[int]:
        """Return class ids by logit descending, then id ascending, computed by NumPy in float64."""
        return sorted(range(len(self.weights)), key=lambda c: (-self.logits()[row, c], c))

    def logits(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return exact logits: every product and sum below fits in 53 bits."""
        weights, biases, hidden = (x.numpy().astype(np.float64) for x in (self.weights, self.biases, self.hidden))
        return np.asarray(hidden @ weights.T + biases)


@pytest.fixture
def table(rng: np.random.Generator) -> Table:
    """A table of values on a grid of 1/16 in [-4, 4]: sums are exact in any order, and so are ties.

    Classes 1, 50 and 96 share one row, the best for hidden 0; 3 and 4 share another; class 60 ties with 1 for hidden 2,
    which is 0 in the columns that differ; for hidden 1 only the 17 different biases matter.
    """
    weights = rng.integers(-64, 65, (V, D)) / 16.0
    biases = rng.integers(-8, 9, V) / 4.0
    hidden = rng.integers(-64, 65, (N, D)) / 16.0
    weights[1], biases[1] = [4.0, -4.0, 4.0, 4.0, -4.0], 2.0
    weights[[50, 96]], biases[[50, 96]] = weights[1], biases[1]
    weights[4], biases[4] = weights[3], biases[3]
    hidden[0], hidden[1] = weights[1], 0.0
    weights[60, 1:], biases[60], hidden[2, 0] = weights[1, 1:], biases[1], 0.0
    return Table(*(torch.from_numpy(x) for x in (weights, biases, hidden)))


def ask(cut: Any, num_pieces: int, question: Question) -> list[ScanAnswer]:
    """Return all answers, slice by slice, and in shard order within a slice."""
    return [answer for piece in range(num_pieces) for answer in cut.ask("scan", question, piece, num_pieces)]


def hidden_for(cut: Any, hidden: Tensor) -> Tensor:
    return hidden.to(getattr(torch, cut.spec.compute_dtype))


def asked(cut: Any, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
    """Return logits and keys of class_ids [N, S], summed over shards."""
    answers = cut.ask("asked_logits", hidden, class_ids)
    logits, keys = (torch.stack([getattr(a, name) for a in answers]).sum(0) for name in ("logits", "keys"))
    return AskedLogits(logits, keys, answers[0].version)


@every_cut
@every_dtype
@pytest.mark.parametrize("k", [1, 6, V])
def test_top_k_is_exact_with_ties_by_id(
    make_cut: MakeCut, table: Table, num_shards: int, strategy: str, num_pieces: int, dtype: str, k: int
) -> None:
    """The k best of all slices are in order of logit descending, then id ascending, wherever equal rows are stored."""
    cut = make_cut(table.weights, table.biases, num_shards=num_shards, strategy=strategy, dtype=dtype)
    answers = ask(cut, num_pieces, Question(hidden_for(cut, table.hidden), None, None, k, False))
    assert all(answer.best.class_ids.shape[1] <= k for answer in answers)
    found, _ = best_of(answers, k)
    assert found.class_ids.tolist() == [table.order(n)[:k] for n in range(N)]
    expected = np.take_along_axis(table.logits(), found.class_ids.numpy(), 1)
    np.testing.assert_array_equal(found.logits.numpy(), expected)


@every_cut
@every_dtype
def test_rank_counts_what_stands_before_the_label(
    make_cut: MakeCut, table: Table, num_shards: int, strategy: str, num_pieces: int, dtype: str
) -> None:
    """rank - 1 = #{z > z_y} + #{z = z_y, id < y}: over all classes as labels, ties included, each rank occurs once."""
    cut = make_cut(table.weights, table.biases, num_shards=num_shards, strategy=strategy, dtype=dtype)
    for row in range(N):
        labels = torch.arange(V)
        hidden = hidden_for(cut, table.hidden[row].expand(V, D))
        keys = asked(cut, hidden, labels[:, None]).keys[:, 0]
        before = sum_before(ask(cut, num_pieces, Question(hidden, labels, keys, 0, False)), V)
        expected = {class_id: place for place, class_id in enumerate(table.order(row))}
        assert before.tolist() == [expected[c] for c in range(V)]


@every_cut
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_lse_is_that_of_all_classes(
    make_cut: MakeCut, num_shards: int, strategy: str, num_pieces: int, dtype: str, scale: float
) -> None:
    """The log-sum-exp of the slices' log-sum-exps is the float64 value, up to a few roundings in the table's dtype."""
    weights, biases, hidden = scale * torch.randn(V, D).double(), torch.randn(V).double(), torch.randn(N, D).double()
    if dtype == "float32":
        weights, biases, hidden = (x.float().double() for x in (weights, biases, hidden))
    cut = make_cut(weights, biases, num_shards=num_shards, strategy=strategy, dtype=dtype)
    lse = merged_lse(ask(cut, num_pieces, Question(hidden_for(cut, hidden), None, None, 0, True)))
    logits = hidden @ weights.T + biases
    precision = 2.0**-24 if dtype == "float32" else 2.0**-53
    expected = torch.logsumexp(logits, 1)
    torch.testing.assert_close(lse, expected, rtol=0, atol=8 * precision * float(logits.abs().max()))


@every_cut
@every_dtype
def test_asked_logits_add_up_over_shards(
    make_cut: MakeCut, table: Table, num_shards: int, strategy: str, num_pieces: int, dtype: str
) -> None:
    """Each shard returns its own classes' logits and 0 for others and for padding, so their sum is the logit."""
    cut = make_cut(table.weights, table.biases, num_shards=num_shards, strategy=strategy, dtype=dtype)
    class_ids = torch.stack([torch.randperm(V)[:4] for _ in range(N)])
    class_ids[3, 1] = -1
    logits = asked(cut, hidden_for(cut, table.hidden), class_ids).logits
    expected = np.take_along_axis(table.logits(), class_ids.clamp(min=0).numpy(), 1)
    expected[3, 1] = 0.0
    np.testing.assert_array_equal(logits.numpy(), expected)


@pytest.mark.parametrize("strategy", ["div", "mod"])
def test_a_slice_does_not_see_the_rest(make_cut: MakeCut, table: Table, strategy: str) -> None:
    """Slices of a shard are disjoint and complete, even with more slices than rows or with empty shards."""
    few = 5
    cut = make_cut(table.weights[:few], table.biases[:few], num_shards=7, strategy=strategy)
    hidden = table.hidden.double()
    for num_pieces in (1, 2, 3):
        answers = ask(cut, num_pieces, Question(hidden, None, None, few, True))
        ids = torch.cat([answer.best.class_ids for answer in answers], 1)
        assert all(sorted(row) == list(range(few)) for row in ids.tolist())
        expected = torch.logsumexp(torch.from_numpy(table.logits()[:, :few]), 1)
        torch.testing.assert_close(merged_lse(answers), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strategy", ["div", "mod"])
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 1.0, 300.0]), num_shards=st.sampled_from([1, 2, 3, 7]))
def test_equal_rows_tie_whatever_their_values(
    make_cut: MakeCut, dtype: str, strategy: str, seed: int, scale: float, num_shards: int
) -> None:
    """In rows of arbitrary values, copies of a class are adjacent in id order, wherever they are stored."""
    cut, hidden, copies = with_copies(make_cut, dtype, strategy, seed, scale, num_shards, orthogonal=False)
    assert_copies_tie(cut, hidden, copies)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=st.integers(0, 2**32), num_shards=st.sampled_from([1, 2, 3, 7]))
def test_equal_rows_tie_where_terms_cancel(make_cut: MakeCut, dtype: str, seed: int, num_shards: int) -> None:
    """Copies also tie for a hidden orthogonal to their row, whose logit is only the rounding error of the sum."""
    cut, hidden, copies = with_copies(make_cut, dtype, "mod", seed, 1.0, num_shards, orthogonal=True)
    assert_copies_tie(cut, hidden, copies)


def with_copies(
    make_cut: MakeCut, dtype: str, strategy: str, seed: int, scale: float, num_shards: int, orthogonal: bool
) -> tuple[Any, Tensor, list[int]]:
    """Return a table in which every fifth class has the same row, with its hidden and the ids of the copies."""
    generator = torch.Generator().manual_seed(seed)
    weights, hidden = (torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (V, N))
    weights *= scale
    copies = list(range(0, V, 5))
    row = weights[0].clone()
    if orthogonal:
        hidden[:, 5:] = hidden[:, :5]
        row[5:] = -row[:5]
    weights[copies] = row
    cut = make_cut(weights, torch.zeros(V).double(), num_shards=num_shards, strategy=strategy, dtype=dtype)
    return cut, hidden_for(cut, hidden), copies


def assert_copies_tie(cut: Any, hidden: Tensor, copies: list[int]) -> None:
    """Assert that the copies are adjacent by id in the whole order, and that their ranks are consecutive."""
    found, _ = best_of(ask(cut, 2, Question(hidden, None, None, V, False)), V)
    for row in found.class_ids.tolist():
        first = row.index(copies[0])
        assert row[first : first + len(copies)] == copies
    labels = torch.tensor(copies)
    for row in hidden:
        rows = row.expand(len(labels), -1)
        keys = asked(cut, rows, labels[:, None]).keys[:, 0]
        before = sum_before(ask(cut, 2, Question(rows, labels, keys, 0, False)), len(labels))
        assert (before.diff() == 1).all()
