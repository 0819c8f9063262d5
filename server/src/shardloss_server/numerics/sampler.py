"""Candidate samplers: pure functions of (kind, num_sampled, unique, num_classes, seed, step).

Bits come from NumPy's counter-based Philox with key (seed, step), so a draw is the same on every shard count, rank
and retry. Expected counts follow TensorFlow's candidate_sampling_ops: Q = p * S with repeats, and
Q = 1 - (1 - p)^num_tries where draws continue until S distinct ids are found (p * S where that takes S draws).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_BLOCK = 1 << 8  # draws made at once, at least
MAX_TRIES = 1 << 27  # draws before a distinct sample is given up, whatever its size: some seconds of work


class TriesExhausted(Exception):
    """A distinct sample would need more than `max_tries` draws."""


def max_tries(num_sampled: int) -> int:
    """Draws before a distinct sample of S ids is given up; half of all classes log-uniformly take about 6 S."""
    return min(MAX_TRIES, 32 * num_sampled + (1 << 20))


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution over [0, num_classes): its log-free probability and its inverse from uniform bits."""

    num_classes: int
    probability: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    from_uniform: Callable[[NDArray[np.float64]], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Draw:
    """Sampled ids [S] in drawing order and the number of draws made."""

    sampled: NDArray[np.int64]
    num_tries: int


def uniform(num_classes: int) -> Distribution:
    """p(k) = 1 / V."""

    def from_uniform(u: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.minimum((u * num_classes).astype(np.int64), num_classes - 1)

    return Distribution(num_classes, lambda ids: np.full(ids.shape, 1.0 / num_classes), from_uniform)


def log_uniform(num_classes: int) -> Distribution:
    """p(k) = log((k + 2) / (k + 1)) / log(V + 1): Zipf-like, for ids sorted by falling frequency."""
    log_range = math.log1p(num_classes)

    def probability(ids: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.log1p(1.0 / (ids + 1.0)) / log_range)

    def from_uniform(u: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(np.exp(u * log_range).astype(np.int64) - 1, 0, num_classes - 1)

    return Distribution(num_classes, probability, from_uniform)


DISTRIBUTIONS: dict[str, Callable[[int], Distribution]] = {"log_uniform": log_uniform, "uniform": uniform}


def draw(distribution: Distribution, num_sampled: int, unique: bool, seed: int, step: int) -> Draw:
    """Draw S candidates; cost O(S) with repeats and O(num_tries) where distinct, never O(V).

    Raises:
        TriesExhausted: distinct, and num_sampled is so close to num_classes that the rarest ids do not come.
    """
    bits = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    if not unique:
        return Draw(distribution.from_uniform(bits.random(num_sampled)), num_sampled)
    found = np.zeros(0, dtype=np.int64)
    block_size = max(2 * num_sampled, MIN_BLOCK)
    for start in range(0, max_tries(num_sampled), block_size):
        block = distribution.from_uniform(bits.random(block_size))
        class_ids, first = np.unique(block, return_index=True)
        first = np.sort(first[~np.isin(class_ids, found, assume_unique=True)])[: num_sampled - len(found)]
        found = np.concatenate([found, block[first]])
        if len(found) == num_sampled:
            return Draw(found, start + int(first[-1]) + 1)
    raise TriesExhausted


def expected_count(
    distribution: Distribution, class_ids: NDArray[np.int64], num_sampled: int, unique: bool, num_tries: int
) -> NDArray[np.float64]:
    """Q of classes of any shape: how often each is expected in the draw.

    Q = p * S with repeats, and where the first S draws are distinct already; Q = -expm1(num_tries * log1p(-p)) else.
    Source: TensorFlow 2.21, candidate_sampling_ops (the second case is its, too: golden cases of tf_candidate_sampler).
    """
    p = distribution.probability(class_ids)
    if not unique or num_tries == num_sampled:
        return p * num_sampled
    with np.errstate(divide="ignore"):  # p = 1 where V = 1: log1p(-1) = -inf gives Q = 1
        return np.asarray(-np.expm1(num_tries * np.log1p(-p)))
