"""Weights learned from the classes seen so far, drawn through a Fenwick tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument

MAX_TOTAL = 1 << 62  # keeps sums within 64 bits, whatever commits add


class LearnedCounts:
    """A Distribution whose weights start at 1 and grow by 1 with every id added: p = weight / sum of weights.

    The weights are 64-bit integers, so sums are exact and do not depend on the order of adds. Creation costs O(V); an
    added id and a draw cost O(log V). Not thread-safe: threads that share one need a lock around each call. Source:
    TensorFlow 2.21, learned_unigram_candidate_sampler; Fenwick, "A New Data Structure for Cumulative Frequency Tables"
    (1994).
    """

    __slots__ = ("_counts", "_total", "_tree")

    def __init__(self, num_classes: int) -> None:
        self._counts = np.ones(num_classes, dtype=np.int64)
        self._total = num_classes
        # Node i > 0 holds the sum of the weights of ids [i - lowbit(i), i). Nodes beyond V are heavier than any draw,
        # so that no descent reaches them.
        self._tree = np.arange(1 << num_classes.bit_length(), dtype=np.int64)
        self._tree &= -self._tree
        self._tree[num_classes + 1 :] = np.iinfo(np.int64).max

    @property
    def num_classes(self) -> int:
        """The number of classes V."""
        return len(self._counts)

    @property
    def num_possible(self) -> int:
        """The number of classes V, because no weight is 0."""
        return len(self._counts)

    def add(self, ids: NDArray[np.int64]) -> None:
        """Add 1 to the weight of each id in ids, of any shape; an id given twice gets 2. O(len(ids) log V).

        Raises:
            InvalidArgument: an id is outside [0, V); nothing is added.
        """
        ids = np.asarray(ids, dtype=np.int64).ravel()
        wrong = (ids < 0) | (ids >= self.num_classes)
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidArgument(f"ids[{at}] = {ids[at]} is outside [0, {self.num_classes})", field="ids", index=at)
        np.add.at(self._counts, ids, 1)
        self._total += len(ids)
        nodes = ids + 1
        while len(nodes):
            np.add.at(self._tree, nodes, 1)
            nodes = nodes + (nodes & -nodes)
            nodes = nodes[nodes <= self.num_classes]

    def overwrite(self, first: int, weights: NDArray[np.int64]) -> None:
        """Set the weights [M], each >= 1, of the M ids starting at `first`. O(M log V).

        Raises:
            InvalidArgument: an id is outside [0, V), a weight is below 1, or the sum of all weights would exceed 2^62;
                nothing changes.
        """
        ids = np.arange(first, first + len(weights))
        if first < 0 or first + len(weights) > self.num_classes:
            raise InvalidArgument(f"{len(weights)} ids from {first} on are not all in [0, {self.num_classes})")
        if len(weights) and int(weights.min()) < 1:
            at = int(weights.argmin())
            raise InvalidArgument(f"learned[{at}] = {weights[at]} must be at least 1", field="learned", index=at)
        added = sum(map(int, weights)) - int(self._counts[ids].sum())  # Python's integers do not overflow
        if self._total + added > MAX_TOTAL:
            raise InvalidArgument(f"learned: the sum of all weights would exceed 2^62 = {MAX_TOTAL}", field="learned")
        changes = weights - self._counts[ids]
        self._counts[ids] = weights
        self._total += added
        nodes = ids + 1
        while len(nodes):
            np.add.at(self._tree, nodes, changes)
            nodes = nodes + (nodes & -nodes)
            stays = nodes <= self.num_classes
            nodes, changes = nodes[stays], changes[stays]

    def frequency(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the weights of ids, of any shape: 1 + the number of times that each was added."""
        return np.asarray(self._counts[ids])

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return p of ids, of any shape."""
        return np.asarray(self.frequency(ids) / self._total)

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Return [n] independent draws: each is the id into whose range a random integer below the total falls."""
        rest = bits.integers(self._total, size=n)
        ids = np.zeros(n, dtype=np.int64)
        for level in reversed(range(self.num_classes.bit_length())):
            nodes = ids + (1 << level)
            weights = self._tree[nodes]
            goes_on = weights <= rest
            ids = np.where(goes_on, nodes, ids)
            rest -= np.where(goes_on, weights, 0)
        return ids
