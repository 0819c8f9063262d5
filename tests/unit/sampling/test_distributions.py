"""The parts of the samplers one by one: alias tables, learned counts, mixtures, class centers and errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from shardloss import sampling
from shardloss.errors import InvalidArgument

Counts = NDArray[np.float64]
counts_lists = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-150, 1e150)), min_size=1, max_size=70
).filter(any)

few_counts = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=9).filter(any)  # equal partial sums


def reconstructed(fixed: sampling.FixedUnigram) -> Counts:
    """Return p [V] as drawn by the alias table: a slot of size 1 / V keeps its part and gives the rest to its alias."""
    given_away = np.bincount(fixed.alias, 1.0 - fixed.keep, minlength=len(fixed.keep))
    return np.asarray((fixed.keep + given_away) / len(fixed.keep))


# Fixed unigram


@given(st.one_of(counts_lists, few_counts), st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.0]))
def test_an_alias_table_draws_its_probabilities(counts: list[float], distortion: float) -> None:
    """The table draws p = counts**distortion / sum to 1e-12; slots keep between 0 and 1; p = 0 is never drawn."""
    fixed = sampling.fixed_unigram(counts, distortion)
    log_weights = distortion * np.log(np.array(counts) + (np.array(counts) == 0))
    weights = np.where((np.array(counts) > 0) | (distortion == 0), np.exp(log_weights - log_weights.max()), 0.0)
    assert fixed.p.sum() == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(fixed.p, weights / weights.sum(), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(reconstructed(fixed), fixed.p, rtol=0, atol=1e-12)
    assert ((fixed.keep >= 0) & (fixed.keep <= 1)).all()
    assert (reconstructed(fixed)[fixed.p == 0] == 0).all()
    assert fixed.num_possible == np.count_nonzero(fixed.p)


@pytest.mark.parametrize("num_classes", [65_537, 1_000_003])
@pytest.mark.parametrize("shape", ["zipf", "pareto", "one in 97", "one in 100 heavy", "half is zero", "equal"])
def test_a_large_alias_table_draws_its_probabilities(num_classes: int, shape: str, rng: np.random.Generator) -> None:
    """Probabilities are exact to 1e-12 even if a million rounding errors of the same sign could add up."""
    ids = np.arange(num_classes)
    counts = {
        "zipf": lambda: 1.0 / (1 + ids),
        "pareto": lambda: rng.pareto(1.1, num_classes),
        "one in 97": lambda: np.where(ids % 97 == 0, 1.0, 1e-9),
        "one in 100 heavy": lambda: np.where(ids % 100 == 0, 301.7, 1.0),
        "half is zero": lambda: np.where(rng.random(num_classes) < 0.5, 0.0, 1.0 + rng.random(num_classes)),
        "equal": lambda: np.full(num_classes, 0.3),
    }[shape]()
    fixed = sampling.fixed_unigram(counts)
    np.testing.assert_allclose(fixed.p, counts / counts.sum(), rtol=1e-12)
    np.testing.assert_allclose(reconstructed(fixed), fixed.p, rtol=1e-10, atol=0)
    np.testing.assert_allclose(reconstructed(fixed), fixed.p, rtol=0, atol=1e-12)


def test_a_tiny_probability_keeps_its_digits() -> None:
    """With counts 1, 1e-30 and 1 a slot keeps 1.5e-30, which one uniform number over all slots could not resolve."""
    fixed = sampling.fixed_unigram([1.0, 1e-30, 1.0])
    assert fixed.keep[1] == pytest.approx(1.5e-30, rel=1e-12)
    assert fixed.p[1] == pytest.approx(0.5e-30, rel=1e-12)


class ZeroBits(np.random.Generator):
    """A generator whose deciding numbers are all 0, so that each slot keeps its own class if it can."""

    def random(self, size: tuple[int, int]) -> Counts:  # type: ignore[override]
        """Return a number for each slot in turn, with a deciding number of 0."""
        return np.stack([(np.arange(size[0]) + 0.5) / size[0], np.zeros(size[0])], axis=1)


def test_a_count_of_zero_is_not_drawn_even_by_a_zero() -> None:
    """A deciding number of 0 is below every kept part > 0 and not below 0, so a class of p = 0 is not drawn."""
    fixed = sampling.fixed_unigram([0.0, 2.0, 0.0, 1.0, 4.0, 0.0, 0.0])
    drawn = fixed.draw(ZeroBits(np.random.Philox()), 7)
    assert set(drawn.tolist()) <= {1, 3, 4}
    assert drawn[[1, 3, 4]].tolist() == [1, 3, 4]


def test_reserved_ids_are_ignored_whatever_stands_there() -> None:
    """Counts of reserved ids may be NaN or negative, and the caller's array is unchanged."""
    counts = np.array([np.nan, -1.0, 5.0, 15.0])
    fixed = sampling.fixed_unigram(counts, 1.0, num_reserved_ids=2)
    assert fixed.p.tolist() == [0.0, 0.0, 0.25, 0.75]
    assert np.isnan(counts[0])
    assert sampling.fixed_unigram(counts, 0.0, num_reserved_ids=2).p.tolist() == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "counts, distortion, num_reserved_ids, field, index",
    [
        ([1.0, 2.0, -0.5], 1.0, 0, "counts", "2"),
        ([1.0, np.nan, 3.0], 1.0, 0, "counts", "1"),
        ([np.inf, 1.0], 1.0, 0, "counts", "0"),
        ([0.0, 0.0, 0.0], 1.0, 0, "counts", None),
        ([7.0, 0.0, 0.0], 1.0, 1, "counts", None),
        ([], 1.0, 0, "counts", None),
        ([[1.0, 2.0]], 1.0, 0, "counts", None),
        ([1.0, 2.0], 1.0, 2, "num_reserved_ids", None),
        ([1.0, 2.0], 1.0, -1, "num_reserved_ids", None),
        ([0.0, 2.0], -1.0, 0, "distortion", None),
        ([1.0, 2.0], np.nan, 0, "distortion", None),
    ],
)
def test_counts_without_a_distribution_are_refused(
    counts: list[float], distortion: float, num_reserved_ids: int, field: str, index: str | None
) -> None:
    """InvalidArgument names the argument and the index of the first invalid count."""
    with pytest.raises(InvalidArgument) as refused:
        sampling.fixed_unigram(counts, distortion, num_reserved_ids)
    assert (refused.value.field, refused.value.index) == (field, index)


# Learned counts


@given(st.integers(1, 40), st.lists(st.lists(st.integers(0, 39), max_size=9), max_size=5), st.data())
def test_learned_counts_are_a_tally(num_classes: int, adds: list[list[int]], data: st.DataObject) -> None:
    """A class's weight is 1 + the times it was added; number r draws the class whose range of summed weights has r."""
    counts, tally = sampling.LearnedCounts(num_classes), np.ones(num_classes, dtype=np.int64)
    for ids in adds:
        valid = np.array([k % num_classes for k in ids], dtype=np.int64)
        counts.add(valid)
        np.add.at(tally, valid, 1)
    ids = np.arange(num_classes)
    assert counts.frequency(ids).tolist() == tally.tolist()
    np.testing.assert_allclose(counts.probability(ids[:, None]), (tally / tally.sum())[:, None], rtol=1e-15)
    assert counts.num_classes == counts.num_possible == num_classes

    class EveryNumber(np.random.Generator):
        def integers(self, high: int, size: int) -> NDArray[np.int64]:  # type: ignore[override]
            assert high == tally.sum()
            return np.arange(size)

    drawn = counts.draw(EveryNumber(np.random.Philox()), int(tally.sum()))
    assert drawn.tolist() == np.repeat(ids, tally).tolist()


def test_an_id_outside_the_classes_is_refused_and_adds_nothing() -> None:
    """InvalidArgument gives the place of the id, and no count changes; -1 would be the last class in NumPy."""
    counts = sampling.LearnedCounts(7)
    for wrong in (-1, 7):
        with pytest.raises(InvalidArgument) as refused:
            counts.add(np.array([3, wrong, 2]))
        assert (refused.value.field, refused.value.index) == ("ids", "1")
    assert counts.frequency(np.arange(7)).tolist() == [1] * 7


# Mixtures, distinct draws, all candidates


def test_a_mixture_knows_how_many_classes_are_possible() -> None:
    """num_possible counts the classes with p > 0 in a component whose share is above 0."""
    odd, low = sampling.fixed_unigram([0, 1, 0, 2, 0, 3, 0]), sampling.fixed_unigram([1, 1, 0, 0, 0, 0, 0])
    assert sampling.mixture(odd, low, 0.5).num_possible == 4
    assert sampling.mixture(odd, low, 1.0).num_possible == 3
    assert sampling.mixture(odd, low, 0.0).num_possible == 2
    assert sampling.mixture(odd, sampling.uniform(7), 0.9).num_possible == 7


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(InvalidArgument) as refused:
        sampling.mixture(sampling.uniform(7), sampling.uniform(7), share)
    assert refused.value.field == "share"


def test_components_over_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        sampling.mixture(sampling.uniform(7), sampling.uniform(8), 0.5)
    assert refused.value.field == "second"


def test_more_distinct_ids_than_are_possible_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """TriesExhausted is raised from num_possible before any draw, not after 2^20 tries."""
    fixed = sampling.fixed_unigram([0, 1, 0, 2, 3])
    assert fixed.num_possible == 3
    assert sorted(sampling.draw(fixed, 3, True, 0, 0).sampled.tolist()) == [1, 3, 4]

    def no_bits(*_: object) -> None:
        raise AssertionError("a draw was made")

    monkeypatch.setattr(sampling.FixedUnigram, "draw", no_bits)
    with pytest.raises(sampling.TriesExhausted):
        sampling.draw(fixed, 4, True, 0, 0)


@pytest.mark.parametrize("unique", [False, True])
def test_the_same_key_gives_the_same_draw_of_every_distribution(unique: bool) -> None:
    """A draw is a function of (seed, step), even if it takes several random numbers; other keys give other draws."""
    made = [
        lambda: sampling.fixed_unigram(np.arange(1.0, 174.0)),
        lambda: sampling.mixture(sampling.log_uniform(173), sampling.uniform(173), 0.4),
        lambda: sampling.LearnedCounts(173),
    ]
    for make in made:
        keys = [(0, 0), (0, 1), (1, 0), (2**63, 2**40)]
        first = [sampling.draw(make(), 31, unique, *key) for key in keys]
        again = [sampling.draw(make(), 31, unique, *key) for key in keys]
        assert [d.sampled.tolist() for d in first] == [d.sampled.tolist() for d in again]
        assert [d.num_tries for d in first] == [d.num_tries for d in again]
        assert len({tuple(d.sampled) for d in first}) == len(keys)


def test_draws_by_more_than_one_number_are_those_of_the_first_release() -> None:
    """The bits of a (seed, step) never change for alias tables, mixtures, learned counts and class centers."""
    learned = sampling.LearnedCounts(173)
    learned.add(np.arange(100))
    fixed = sampling.fixed_unigram(np.arange(173.0), 0.75)
    mixed = sampling.mixture(sampling.log_uniform(173), fixed, 0.4)
    assert sampling.draw(fixed, 7, True, 7, 123_456).sampled.tolist() == [28, 126, 34, 85, 118, 54, 155]
    assert sampling.draw(mixed, 7, True, 7, 123_456).sampled.tolist() == [0, 77, 127, 72, 58, 7, 114]
    assert sampling.draw(learned, 7, True, 7, 123_456).sampled.tolist() == [0, 22, 134, 60, 152, 99, 4]
    assert sampling.partial_fc(np.array([9, 3]), 173, 7, 7, 123_456).tolist() == [3, 9, 125, 145, 158, 75, 1]


def test_all_candidates_are_every_class_in_order() -> None:
    drawn = sampling.all_candidates(7)
    assert drawn.sampled.tolist() == list(range(7))
    assert drawn.sampled.dtype == np.int64


# Class centers


@given(
    st.integers(1, 40),
    st.lists(st.integers(-1, 39), max_size=20),
    st.integers(0, 45),
    st.integers(0, 2**63),
    st.integers(0, 2**40),
)
def test_class_centers_hold_every_label_once(
    num_classes: int, labels: list[int], num_sampled: int, seed: int, step: int
) -> None:
    """The centers are the labels in ascending order, then other classes, min(V, max(S, num_labels)) in all."""
    given_labels = np.array([y % num_classes if y >= 0 else y for y in labels], dtype=np.int64)
    positives = sorted(set(given_labels.tolist()) - {-1})
    centers = sampling.partial_fc(given_labels, num_classes, num_sampled, seed, step).tolist()
    assert centers[: len(positives)] == positives
    assert len(centers) == len(set(centers)) == min(num_classes, max(num_sampled, len(positives)))
    assert all(0 <= k < num_classes for k in centers)
    assert centers == sampling.partial_fc(given_labels[::-1], num_classes, num_sampled, seed, step).tolist()


def test_class_centers_refuse_labels_beyond_the_classes() -> None:
    with pytest.raises(InvalidArgument) as refused:
        sampling.partial_fc(np.array([3, 11]), 11, 5, 0, 0)
    assert refused.value.field == "labels"
    with pytest.raises(InvalidArgument) as refused:
        sampling.partial_fc(np.array([3]), 11, -1, 0, 0)
    assert refused.value.field == "num_sampled"
