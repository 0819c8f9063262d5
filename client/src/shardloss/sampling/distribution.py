"""Distributions over the class ids [0, V): the probability of each id, and draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument

SLICE = 1 << 20  # number of class ids to look at together in a pass over all of them


class Distribution(Protocol):
    """A distribution over [0, num_classes)."""

    @property
    def num_classes(self) -> int:
        """The number of classes V."""
        ...

    @property
    def num_possible(self) -> int:
        """The number of classes with p > 0, which is also the size of the largest distinct draw."""
        ...

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return p of ids in [0, V), of any shape."""
        ...

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Return [n] independent draws, which depend on nothing but the bits."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """The distribution p(k) = 1 / V; a draw uses one uniform number."""

    num_classes: int

    @property
    def num_possible(self) -> int:
        return self.num_classes

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.full(ids.shape, 1.0 / self.num_classes)

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        return np.minimum((bits.random(n) * self.num_classes).astype(np.int64), self.num_classes - 1)


@dataclass(frozen=True, slots=True)
class LogUniform:
    """The distribution p(k) = log((k + 2) / (k + 1)) / log(V + 1); a draw uses one uniform number."""

    num_classes: int

    @property
    def num_possible(self) -> int:
        return self.num_classes

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.log1p(1.0 / (ids + 1.0)) / math.log1p(self.num_classes))

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        log_range = math.log1p(self.num_classes)
        return np.clip(np.exp(bits.random(n) * log_range).astype(np.int64) - 1, 0, self.num_classes - 1)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixture share * first.p(k) + (1 - share) * second.p(k); a uniform number chooses each draw's component."""

    first: Distribution
    second: Distribution
    share: float
    num_possible: int

    @property
    def num_classes(self) -> int:
        return self.first.num_classes

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.share * self.first.probability(ids) + (1.0 - self.share) * self.second.probability(ids)

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        from_first = bits.random(n) < self.share
        num_first = int(from_first.sum())
        drawn = np.empty(n, dtype=np.int64)
        drawn[from_first] = self.first.draw(bits, num_first)
        drawn[~from_first] = self.second.draw(bits, n - num_first)
        return drawn


def uniform(num_classes: int) -> Uniform:
    """Return the distribution p(k) = 1 / V."""
    return Uniform(num_classes)


def log_uniform(num_classes: int) -> LogUniform:
    """Return p(k) = log((k + 2) / (k + 1)) / log(V + 1): Zipf-like, for ids sorted by descending frequency."""
    return LogUniform(num_classes)


DISTRIBUTIONS: dict[str, Callable[[int], Distribution]] = {"log_uniform": log_uniform, "uniform": uniform}


def mixture(first: Distribution, second: Distribution, share: float) -> Mixture:
    """Return p = share * p1 + (1 - share) * p2, for components p1 and p2 over the same classes.

    O(1), or O(V) if both have classes with p = 0.

    Raises:
        InvalidArgument: share is outside [0, 1], or the components are over different numbers of classes.
    """
    if not 0.0 <= share <= 1.0:
        raise InvalidArgument(
            f"share = {share} is outside [0, 1]: it is the share of the first component", field="share"
        )
    if first.num_classes != second.num_classes:
        raise InvalidArgument(
            f"second has {second.num_classes} classes and first has {first.num_classes}; the numbers must be equal",
            field="second",
        )
    return Mixture(first, second, share, num_possible_of(first, second, share))


def num_possible_of(first: Distribution, second: Distribution, share: float) -> int:
    """Return the number of classes that have p > 0 in at least one component with a share above 0."""
    parts = [part for part, weight in ((first, share), (second, 1.0 - share)) if weight > 0.0]
    num_classes = first.num_classes
    if len(parts) == 1:
        return parts[0].num_possible
    if any(part.num_possible == num_classes for part in parts):
        return num_classes
    found = 0
    for start in range(0, num_classes, SLICE):
        ids = np.arange(start, min(start + SLICE, num_classes))
        found += int(np.logical_or(*(part.probability(ids) > 0.0 for part in parts)).sum())
    return found
