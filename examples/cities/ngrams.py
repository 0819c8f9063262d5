"""Names as bags of hashed character n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_N = 4
MARK = " "  # at both ends of every word, so that n-grams show where a word begins and ends
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads neighbouring code points
FOLD, DROP = np.uint64(29), np.uint64(17)  # shifts: high bits are mixed into low ones, and the lowest bits are dropped


@dataclass(frozen=True, slots=True)
class Bags:
    """N bags: gram_ids[offsets[n] : offsets[n + 1]] are the buckets of bag n. gram_ids [G], offsets [N + 1]."""

    gram_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, index: NDArray[np.int64]) -> Bags:
        """Return the bags of index [B], in that order."""
        starts = self.offsets[index]
        counts = self.offsets[index + 1] - starts
        offsets = offsets_of(counts)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, counts)
        return Bags(self.gram_ids[place], offsets)


def offsets_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offset at which each bag begins, and the end of the last: [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def bags(names: Sequence[str], num_buckets: int) -> Bags:
    """Hash every 1- to 4-gram of each normalised name with a mark around each word; a mark alone is not a gram.

    For example, " köln " has the grams { k, ö, l, n, " k", kö, öl, ln, "n ", " kö", ... }. An empty name gives an empty
    bag.
    """
    marked = [f"{MARK}{name}{MARK}" if name else "" for name in names]
    lengths = np.fromiter(map(len, marked), np.int64, len(marked))
    ends = offsets_of(lengths)
    code_points = np.frombuffer("".join(marked).encode("utf-32-le", "surrogatepass"), np.uint32)
    grams = hashed(code_points, np.repeat(ends[1:], lengths), num_buckets)
    kept = grams >= 0
    before = offsets_of(kept.sum(1))  # grams that begin before each code point
    return Bags(grams[kept], before[ends])


def hashed(code_points: NDArray[np.uint32], ends: NDArray[np.int64], num_buckets: int) -> NDArray[np.int32]:
    """Return the buckets of the n-grams that begin at each code point, [P, MAX_N].

    The bucket is -1 if the n-gram would cross the end of its name; ends [P] has that end for each code point.
    """
    num_points = len(code_points)
    position = np.arange(num_points)
    wide = code_points.astype(np.uint64)
    grams = np.full((num_points, MAX_N), -1, np.int32)
    state = np.zeros(num_points, np.uint64)
    for n in range(1, min(MAX_N, num_points) + 1):
        starts = slice(0, num_points - n + 1)
        state = (state[starts] ^ (wide[n - 1 :] + np.uint64(n))) * MULTIPLIER
        state ^= state >> FOLD
        inside = position[starts] + n <= ends[starts]
        if n == 1:
            inside &= code_points != ord(MARK)
        buckets = ((state >> DROP) % np.uint64(num_buckets)).astype(np.int32)
        grams[starts, n - 1] = np.where(inside, buckets, -1)
    return grams
