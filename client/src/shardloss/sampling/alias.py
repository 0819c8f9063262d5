"""Draws with fixed weights in O(1) by Walker's alias method, whose table is built in O(V) without a loop over classes.

Each class has one of V slots. A draw picks a slot at random and returns the slot's own class with probability `keep`,
else the slot's `alias`. A light class (p V < 1) leaves a deficit in its slot; a heavy class (p V >= 1) has an excess.
All deficits laid end to end are as long as all excesses, so a light slot is filled by the heavy class in whose stretch
it begins. Beyond the end of that stretch, the heavy class gives the missing length from its own slot, which the next
heavy class fills.
Source: Huebschle-Schneider and Sanders, "Parallel Weighted Random Sampling" (2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardloss.errors import InvalidArgument

Floats: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FixedUnigram:
    """The distribution p [V]; a draw uses two uniform numbers, so that p far below 2^-53 V is exact, too."""

    p: Floats
    keep: Floats
    alias: Ids
    num_possible: int

    @property
    def num_classes(self) -> int:
        return len(self.p)

    def probability(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self.p[ids])

    def draw(self, bits: np.random.Generator, n: int) -> NDArray[np.int64]:
        numbers = bits.random((n, 2))
        slots = np.minimum((numbers[:, 0] * self.num_classes).astype(np.int64), self.num_classes - 1)
        return np.where(numbers[:, 1] < self.keep[slots], slots, self.alias[slots])


def fixed_unigram(counts: ArrayLike, distortion: float = 1.0, num_reserved_ids: int = 0) -> FixedUnigram:
    """Return p ~ counts**distortion [V], with p = 0 for the first num_reserved_ids ids, whatever their counts.

    A class of count 0 is never drawn, unless distortion = 0, which makes all classes equally probable (0**0 = 1, as in
    TensorFlow). O(V), without a loop over classes. Source: TensorFlow 2.21, fixed_unigram_candidate_sampler.

    Raises:
        InvalidArgument: counts are not [V], negative, not finite or all zero; or distortion or num_reserved_ids does
            not fit them.
    """
    weights = np.array(counts, dtype=np.float64)
    if weights.ndim != 1 or not len(weights):
        raise InvalidArgument(f"counts has shape {list(weights.shape)}; [V >= 1] is needed", field="counts")
    if not 0 <= num_reserved_ids < len(weights):
        raise InvalidArgument(
            f"num_reserved_ids = {num_reserved_ids} is outside [0, {len(weights)}): at least one class must remain",
            field="num_reserved_ids",
        )
    weights[:num_reserved_ids] = 0.0
    check_counts(weights)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        weights = (weights / weights.max()) ** distortion  # scaled so that no sum overflows
    weights[:num_reserved_ids] = 0.0
    if not np.isfinite(weights.sum()):
        raise InvalidArgument(
            f"distortion = {distortion}: the sum of counts**distortion is not finite", field="distortion"
        )
    p = weights / weights.sum()
    return FixedUnigram(p, *alias_table(p), num_possible=int(np.count_nonzero(p)))


def check_counts(counts: Floats) -> None:
    """Refuse counts [V] that are negative, not finite or all 0."""
    for wrong, what in ((~np.isfinite(counts), "is not finite"), (counts < 0, "is negative")):
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidArgument(f"counts[{at}] = {counts[at]} {what}", field="counts", index=at)
    if not counts.any():
        raise InvalidArgument("counts are all 0: there is nothing to draw", field="counts")


def alias_table(p: Floats) -> tuple[Floats, Ids]:
    """Return keep [V] and alias [V] of probabilities p [V].

    p[k] = (keep[k] + sum of (1 - keep) over the slots whose alias is k) / V, and keep[k] = p[k] V exactly for a light
    class, so a class with p = 0 is never drawn. The remainder from rounding is added to the last heavy class.
    """
    num_classes = len(p)
    scaled = p * num_classes
    is_light = scaled < 1.0
    is_light[p.argmax()] = False  # heavy, even if rounding has put it below 1
    light, heavy = np.flatnonzero(is_light), np.flatnonzero(~is_light)

    # Fixed point, because sums of 1e7 equal floats drift by 1e-3 of a slot; the total, V slots, is below 2^62. The
    # excesses are scaled to the sum of the rounded deficits, so that the remainder is below 1e-8 of a slot.
    unit = 2.0 ** (62 - num_classes.bit_length())
    light_ends = np.cumsum(np.rint((1.0 - scaled[light]) * unit).astype(np.int64))
    light_starts = np.append(0, light_ends)
    excess = np.maximum(scaled[heavy] - 1.0, 0.0)
    heavy_ends = np.cumsum(np.rint(excess * (light_starts[-1] / (excess.sum() or 1.0))).astype(np.int64))

    keep, alias = np.ones(num_classes), np.arange(num_classes)
    filled_by = np.searchsorted(heavy_ends, light_starts[:-1], side="right")
    keep[light] = scaled[light]
    alias[light] = heavy[np.minimum(filled_by, len(heavy) - 1)]
    inner_ends = heavy_ends[:-1]
    beyond = light_starts[np.searchsorted(light_starts[:-1], inner_ends, side="left")] - inner_ends
    keep[heavy[:-1]] = 1.0 - np.clip(beyond / unit, 0.0, 1.0)
    alias[heavy[:-1]] = heavy[1:]
    return keep, alias
