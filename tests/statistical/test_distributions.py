"""Every distribution draws with its stated probabilities, and distinct draws take as many tries as theory predicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from shardloss import sampling

from ..extent import SEED, sample, scaled
from .frequencies import P_VALUE, assert_same_frequencies, one_sample_z

V = 211  # prime, so that no block or level is full
DRAWS = scaled(5_000, 10_000)  # per step
PAIRS = scaled(50_000, 200_000)
Counts = NDArray[np.float64]
COUNTS = np.where(np.arange(V) % 5 == 3, 0.0, 3.0 + (np.arange(V) * 37 % 101)) ** 2  # a fifth are 0; others 9 to 1e4


def zipf() -> Counts:
    """Return p = log((k + 2) / (k + 1)) / log(V + 1) [V]."""
    return np.diff(np.log(np.arange(1, V + 2))) / np.log(V + 1)


def powers(counts: Counts, distortion: float) -> Counts:
    """Return counts**distortion divided by their sum [V]; a count of 0 stays 0."""
    weights = np.array([count**distortion if count else 0.0 for count in counts])
    return np.asarray(weights / weights.sum())


def reserved() -> Counts:
    """Return the normalized COUNTS**0.5 [V], with 0 for the first 17 ids."""
    return powers(np.where(np.arange(V) < 17, 0.0, COUNTS), 0.5)


def learned_weights() -> Counts:
    """Return the probabilities [V] of `learned`: weight 1 + k mod 7 for class k, and 90 more for class 5."""
    weights = 1.0 + np.arange(V) % 7
    weights[5] += 90
    return np.asarray(weights / weights.sum())


def learned() -> sampling.LearnedCounts:
    """Return counts learned in several adds, with repeats within and across adds."""
    counts = sampling.LearnedCounts(V)
    for k in range(1, 7):
        counts.add(np.flatnonzero(np.arange(V) % 7 >= k)[:, None])
    for num in (1, 88, 1):
        counts.add(np.full(num, 5))
    return counts


DISTRIBUTIONS: dict[str, tuple[Callable[[], sampling.Distribution], Callable[[], Counts]]] = {
    "uniform": (lambda: sampling.uniform(V), lambda: np.full(V, 1 / V)),
    "log_uniform": (lambda: sampling.log_uniform(V), zipf),
    "mixture": (
        lambda: sampling.mixture(sampling.log_uniform(V), sampling.uniform(V), 0.3),
        lambda: 0.3 * zipf() + 0.7 / V,
    ),
    "mixture of fixed and learned": (
        lambda: sampling.mixture(sampling.fixed_unigram(COUNTS), learned(), 0.83),
        lambda: 0.83 * powers(COUNTS, 1.0) + 0.17 * learned_weights(),
    ),
    "fixed": (lambda: sampling.fixed_unigram(COUNTS), lambda: powers(COUNTS, 1.0)),
    "fixed, distorted": (lambda: sampling.fixed_unigram(COUNTS, 0.75), lambda: powers(COUNTS, 0.75)),
    "fixed, reserved": (lambda: sampling.fixed_unigram(COUNTS, 0.5, 17), reserved),
    "fixed, of equal counts": (lambda: sampling.fixed_unigram(np.full(V, 0.7)), lambda: np.full(V, 1 / V)),
    "fixed, distortion 0": (lambda: sampling.fixed_unigram(COUNTS, 0.0), lambda: np.full(V, 1 / V)),
    "fixed, one heavy": (
        lambda: sampling.fixed_unigram(np.where(np.arange(V) == 100, 1e3, 1.0)),
        lambda: powers(np.where(np.arange(V) == 100, 1e3, 1.0), 1.0),
    ),
    "learned": (learned, learned_weights),
}
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


@every_distribution
@pytest.mark.parametrize("seed", sample([2**63 + 1 + SEED, SEED], 1))
def test_draws_fit_their_distribution(name: str, seed: int) -> None:
    """p equals the formula, the draws of 100 steps pass a chi-square test, and classes with p = 0 are never drawn."""
    make, formula = DISTRIBUTIONS[name]
    distribution, p = make(), formula()
    np.testing.assert_allclose(distribution.probability(np.arange(V)), p, rtol=1e-12, atol=0)
    assert distribution.num_possible == np.count_nonzero(p)
    draws = np.concatenate([sampling.draw(distribution, DRAWS, False, seed, step).sampled for step in range(100)])
    observed, expected = np.bincount(draws, minlength=V), p * 100 * DRAWS
    possible = p > 0
    assert not observed[~possible].any()
    assert expected[possible].min() > 5  # so the chi-square approximation is valid
    assert stats.chisquare(observed[possible], expected[possible]).pvalue > P_VALUE


@every_distribution
def test_neighbouring_draws_are_independent(name: str) -> None:
    """The pairs (draw 2k, draw 2k + 1), modulo 6, pass a chi-square test against the product distribution."""
    make, formula = DISTRIBUTIONS[name]
    draws = sampling.draw(make(), 2 * PAIRS, False, 11 + SEED, 3).sampled % 6
    pairs = np.bincount(draws[::2] * 6 + draws[1::2], minlength=36)
    p = np.bincount(np.arange(V) % 6, formula())
    assert stats.chisquare(pairs, np.outer(p, p).ravel() * PAIRS).pvalue > P_VALUE


# Distinct draws compared with enumeration


def small_learned() -> sampling.LearnedCounts:
    """Return learned counts with the weights 1, 3, 1, 2, 1."""
    counts = sampling.LearnedCounts(5)
    counts.add(np.array([1, 3, 1]))
    return counts


SMALL: dict[str, Callable[[], sampling.Distribution]] = {
    "uniform": lambda: sampling.uniform(5),
    "log_uniform": lambda: sampling.log_uniform(5),
    "mixture": lambda: sampling.mixture(sampling.uniform(5), sampling.fixed_unigram([0, 1, 0, 0, 2]), 0.6),
    "fixed": lambda: sampling.fixed_unigram([3, 0, 1, 9, 4], 0.75),
    "learned": small_learned,
}
S, BATCHES = 3, scaled(4_000, 20_000)


def inclusion_by_orders(p: Counts) -> Counts:
    """Return each class's probability of being among S distinct draws [V], summed over all orders of S classes."""
    found = np.zeros(len(p))
    for order in itertools.permutations(np.flatnonzero(p).tolist(), S):
        left, probability = 1.0, 1.0
        for k in order:
            probability *= p[k] / left
            left -= p[k]
        found[list(order)] += probability
    return found


def tries_by_subsets(p: Counts, longest: int) -> Counts:
    """Return P(num_tries = n) for n = 0 to longest, by tracking the possible sets of classes found after each draw."""
    sets = {frozenset[int](): 1.0}
    ended = np.zeros(longest + 1)
    for n in range(1, longest + 1):
        after: dict[frozenset[int], float] = {}
        for found, probability in sets.items():
            for k in range(len(p)):
                after[found | {k}] = after.get(found | {k}, 0.0) + probability * p[k]
        ended[n] = sum(probability for found, probability in after.items() if len(found) == S)
        sets = {found: probability for found, probability in after.items() if len(found) < S}
    return ended


@pytest.mark.parametrize("name", SMALL)
def test_distinct_draws_are_those_of_enumeration(name: str) -> None:
    """Inclusions, numbers of tries and mean Q of many batches of 3 of 5 classes agree with exact sums."""
    distribution = SMALL[name]()
    ids = np.arange(5)
    p = distribution.probability(ids)
    draws = [sampling.draw(distribution, S, True, 19 + SEED, step) for step in range(BATCHES)]

    inclusion = inclusion_by_orders(p)
    found = np.bincount(np.concatenate([draw.sampled for draw in draws]), minlength=5) / BATCHES
    free = (inclusion > 0) & (inclusion < 1 - 1e-12)
    np.testing.assert_allclose(found[~free], inclusion[~free], rtol=1e-12)
    if free.any():
        assert_same_frequencies(one_sample_z(found[free], BATCHES, inclusion[free]))

    longest = 400
    tries = tries_by_subsets(p, longest)
    assert tries.sum() == pytest.approx(1, abs=1e-9)
    observed = np.bincount([draw.num_tries for draw in draws], minlength=longest + 1)
    common = tries * BATCHES > 5
    found, wanted = observed[common], tries[common] * BATCHES
    found[-1] += BATCHES - found.sum()  # rarer numbers of tries belong to the last common one
    wanted[-1] += BATCHES - wanted.sum()
    assert stats.chisquare(found, wanted).pvalue > P_VALUE

    exact = sum(tries[n] * (S * p if n == S else 1 - (1 - p) ** n) for n in range(S, longest + 1))
    ours = [sampling.expected_count(distribution, ids, S, True, draw.num_tries) for draw in draws]
    error = np.std(ours, axis=0) / np.sqrt(BATCHES)
    assert (np.abs(np.mean(ours, axis=0) - exact) <= stats.norm.isf(P_VALUE / 10) * error + 1e-12).all()


@pytest.mark.parametrize("name", SMALL)
def test_with_repeats_q_is_the_mean_count(name: str) -> None:
    """With repeats, Q of a class is the mean number of times that it occurs in a batch of 3."""
    distribution = SMALL[name]()
    q = sampling.expected_count(distribution, np.arange(5), S, False, S)
    draws = [sampling.draw(distribution, S, False, 23 + SEED, step).sampled for step in range(BATCHES)]
    counts = np.bincount(np.concatenate(draws), minlength=5)
    assert q.sum() == pytest.approx(S, rel=1e-12)
    assert not counts[q == 0].any()
    assert stats.chisquare(counts[q > 0], q[q > 0] * BATCHES).pvalue > P_VALUE


# Class centers


@pytest.mark.parametrize(
    "num_classes, num_sampled, num_steps",
    [
        (37, 12, scaled(1000, 5000)),
        (20_011, 107, scaled(600, 3000)),  # NumPy uses another algorithm to choose few of many
    ],
)
def test_negatives_of_class_centers_are_uniform(num_classes: int, num_sampled: int, num_steps: int) -> None:
    """All classes that are not labels are equally frequent, also in the first and last positions of the negatives."""
    labels = np.array([35, 2, 2, 30, -1, 7])
    drawn = np.array(
        [sampling.partial_fc(labels, num_classes, num_sampled, 13 + SEED, k)[4:] for k in range(num_steps)]
    )
    for negatives in (drawn, drawn[:, :1], drawn[:, -1:]):
        observed = np.bincount(negatives.ravel() % 37, minlength=37)
        assert num_classes > 37 or not observed[labels[labels >= 0]].any()
        classes = np.bincount(np.setdiff1d(np.arange(num_classes), labels) % 37, minlength=37)
        possible = classes > 0
        expected = classes[possible] * (negatives.size / classes.sum())
        statistic = ((observed[possible] - expected) ** 2 / expected).sum()
        assert statistic < stats.chi2(possible.sum()).isf(P_VALUE)  # distinct ids can only make the statistic smaller
