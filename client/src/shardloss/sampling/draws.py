"""Draws of a step: pure functions of (distribution, num_sampled, unique, seed, step).

Bits come from NumPy's counter-based Philox with key (seed, step), so a draw is the same on every shard count, rank
and retry. Expected counts follow TensorFlow's candidate_sampling_ops: Q = p * S with repeats, and
Q = 1 - (1 - p)^num_tries if draws continue until S distinct ids are found (p * S if that takes S draws).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument
from shardloss.sampling.distribution import Distribution

MIN_BLOCK = 1 << 8  # least number of draws made at once
MAX_TRIES = 1 << 27  # limit of draws for a distinct sample of any size: some seconds of work


class TriesExhausted(Exception):
    """A failed draw: a distinct sample would need more than `max_tries` draws, or more classes than have p > 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """The sampled ids [S] in drawing order, and the number of draws made."""

    sampled: NDArray[np.int64]
    num_tries: int


def max_tries(num_sampled: int) -> int:
    """Return the limit of draws for S distinct ids; half of all classes, drawn log-uniformly, take about 6 S."""
    return min(MAX_TRIES, 32 * num_sampled + (1 << 20))


def generator(seed: int, step: int) -> np.random.Generator:
    """Return the random bits of a step: Philox with key (seed, step).

    Raises:
        InvalidArgument: seed or step is not an integer in [0, 2^64).
    """
    for number, field in ((seed, "seed"), (step, "step")):
        if not (hasattr(number, "__index__") and 0 <= number < 1 << 64):
            raise InvalidArgument(f"{field} = {number!r} is not an integer in [0, 2^64)", field=field)
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))


def draw(distribution: Distribution, num_sampled: int, unique: bool, seed: int, step: int) -> Draw:
    """Draw S candidates; costs O(S) with repeats and O(num_tries) if they are distinct, never O(V).

    Raises:
        InvalidArgument: num_sampled is negative, or seed or step is not an integer in [0, 2^64).
        TriesExhausted: unique is set, and num_sampled is above distribution.num_possible (raised at once), or so close
            to it that the rarest ids are not found.
    """
    bits = generator(seed, step)
    if num_sampled < 0:
        raise InvalidArgument(f"num_sampled = {num_sampled} is negative", field="num_sampled")
    if not unique or num_sampled == 0:
        return Draw(distribution.draw(bits, num_sampled), num_sampled)
    if num_sampled > distribution.num_possible:
        raise TriesExhausted
    found = np.zeros(0, dtype=np.int64)
    block_size = max(2 * num_sampled, MIN_BLOCK)
    for start in range(0, max_tries(num_sampled), block_size):
        block = distribution.draw(bits, block_size)
        class_ids, first = first_copies(block)
        if len(found):
            first = first[~is_among(class_ids, found)]
        first = np.sort(first)[: num_sampled - len(found)]
        found = np.concatenate([found, block[first]])
        if len(found) == num_sampled:
            return Draw(found, start + int(first[-1]) + 1)
    raise TriesExhausted


def first_copies(class_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct ids, ascending, and each one's first index: np.unique(class_ids, return_index=True)."""
    ordered, place = in_order(class_ids)
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first], place[is_first]


def is_among(class_ids: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return np.isin(class_ids, found), computed with one fast sort; found must not be empty."""
    ordered = np.sort(found)
    place = np.searchsorted(ordered, class_ids)
    return np.asarray(ordered[np.minimum(place, len(ordered) - 1)] == class_ids)


def in_order(class_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids [S] >= 0 in ascending order and the indices they had; copies of an id keep their order.

    Id and index are packed into one number if both fit: NumPy sorts 8,192 of these in 0.03 ms, but takes 0.4 ms for a
    stable argsort.
    """
    bits = len(class_ids).bit_length()
    if len(class_ids) == 0 or int(class_ids.max()) >= 1 << (63 - bits):
        place = np.argsort(class_ids, kind="stable")
        return class_ids[place], place
    packed = (class_ids << bits) | np.arange(len(class_ids))
    packed.sort()
    return packed >> bits, packed & ((1 << bits) - 1)


def expected_count(
    distribution: Distribution, class_ids: NDArray[np.int64], num_sampled: int, unique: bool, num_tries: int
) -> NDArray[np.float64]:
    """Return Q of class ids of any shape: how often each is expected in the draw.

    Q = p * S with repeats, and also if the first S draws are distinct; otherwise Q = -expm1(num_tries * log1p(-p)).
    Source: TensorFlow 2.21, candidate_sampling_ops (the golden cases of tf_candidate_sampler cover the second case,
    too).
    """
    p = distribution.probability(class_ids)
    if not unique or num_tries == num_sampled:
        return p * num_sampled
    with np.errstate(divide="ignore"):  # p = 1 if V = 1: log1p(-1) = -inf gives Q = 1
        return np.asarray(-np.expm1(num_tries * np.log1p(-p)))


def all_candidates(num_classes: int) -> Draw:
    """Return every class once, in order, without random bits; Q = 1. Source: TensorFlow's all_candidate_sampler."""
    return Draw(np.arange(num_classes, dtype=np.int64), num_classes)
