"""Class counts of a table: those the caller wrote, and those that commits have seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shardloss import sampling
from shardloss.errors import InvalidArgument
from shardloss.sampling import Distribution, LearnedCounts

from shardloss_server.frontend.request import Mixture, SamplerSpec

KEPT_ALIASES = 2  # prepared unigrams, by (distortion, num_reserved_ids); each takes 24 bytes a class
KEPT_MIXTURES = 16  # mixtures of which it is known how many classes they can draw


@dataclass(frozen=True, slots=True)
class CountsRead:
    """Counts of a range of classes: written [M] or None where none ever were, learned [M] or None; the version then."""

    written: NDArray[np.float64] | None
    learned: NDArray[np.int64] | None
    version: int


class ClassCounts:
    """What the samplers of one table draw by. Thread-safe; a draw and its expected counts belong into one `unchanging`.

    written counts [V] come from WriteClassCounts and are 0 before; learned ones are kept only where the table counts
    its labels: 1 for each class and 1 more for each label of a commit.
    """

    def __init__(self, num_classes: int, counts_labels: bool) -> None:
        self._num_classes = num_classes
        self._lock = threading.RLock()
        self._written: NDArray[np.float64] | None = None
        self._unigrams: dict[tuple[float, int], Distribution] = {}
        self._num_possible: dict[Mixture, int] = {}
        self._learned = LearnedCounts(num_classes) if counts_labels else None

    @contextmanager
    def unchanging(self, spec: SamplerSpec) -> Iterator[Distribution]:
        """What a sampler draws by, as it is at this moment; learned counts are held, so that nobody adds to them.

        Raises:
            InvalidArgument: it needs counts that are not there.
        """
        with self._lock:
            distribution = self.distribution(spec)
            if is_learned(spec):
                yield distribution
                return
        yield distribution  # never changes: others need not wait for a long draw

    def write(self, first_class: int, counts: NDArray[np.float64]) -> None:
        """Overwrite the written counts [M] of classes from first_class on."""
        with self._lock:
            if self._written is None:
                self._written = np.zeros(self._num_classes)
            self._written[first_class : first_class + len(counts)] = counts
            self._unigrams.clear()
            self._num_possible.clear()

    def write_learned(self, first_class: int, counts: NDArray[np.int64]) -> None:
        """Overwrite the learned counts [M] of classes from first_class on.

        Raises:
            InvalidArgument: the table does not count its labels, or the sum of all would exceed MAX_TOTAL.
        """
        with self._lock:
            self._of_labels("learned").overwrite(first_class, counts)
            self._num_possible.clear()

    def read(self, first_class: int, num_classes: int) -> tuple[NDArray[np.float64] | None, NDArray[np.int64] | None]:
        """Copies of the written and the learned counts [M] of a range of classes; None where there are none."""
        asked = slice(first_class, first_class + num_classes)
        with self._lock:
            written = None if self._written is None else self._written[asked].copy()
            if self._learned is None:
                return written, None
            return written, self._learned.frequency(np.arange(asked.start, asked.stop))

    def learn(self, class_ids: NDArray[np.int64]) -> None:
        """Count the labels of a commit."""
        if self._learned is not None:
            with self._lock:
                self._learned.add(class_ids)

    def learned_frequency(self, class_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Share of each class among all labels that commits have seen, each class one label ahead.

        Raises:
            InvalidArgument: the table does not count its labels.
        """
        with self._lock:
            return self._of_labels("in_batch").probability(class_ids)

    def distribution(self, spec: SamplerSpec) -> Distribution:
        """What a sampler draws by, at this moment.

        Raises:
            InvalidArgument: it needs counts that are not there.
        """
        with self._lock:
            if spec.kind == "mixture":
                assert spec.mixture is not None
                return self._mixture(spec.mixture)
            if spec.kind == "fixed_unigram":
                return self._unigram(spec)
            if spec.kind == "learned_unigram":
                return self._of_labels("learned_unigram")
            return sampling.DISTRIBUTIONS["uniform" if spec.kind == "all" else spec.kind](self._num_classes)

    def _mixture(self, of: Mixture) -> Distribution:
        first, second = self.distribution(of.first), self.distribution(of.second)
        if of not in self._num_possible:  # of two unigrams, all classes are looked at
            while len(self._num_possible) >= KEPT_MIXTURES:
                self._num_possible.pop(next(iter(self._num_possible)))
            self._num_possible[of] = sampling.mixture(first, second, of.share).num_possible
        return sampling.Mixture(first, second, of.share, self._num_possible[of])

    def _unigram(self, spec: SamplerSpec) -> Distribution:
        key = (spec.distortion, spec.num_reserved_ids)
        if key not in self._unigrams:
            if self._written is None or not self._written[spec.num_reserved_ids :].any():
                raise InvalidArgument(
                    "fixed_unigram needs class counts above 0: write them first",
                    field="sampler.kind",
                )
            while len(self._unigrams) >= KEPT_ALIASES:
                self._unigrams.pop(next(iter(self._unigrams)))
            self._unigrams[key] = sampling.fixed_unigram(self._written, spec.distortion, spec.num_reserved_ids)
        return self._unigrams[key]

    def _of_labels(self, what: str) -> LearnedCounts:
        if self._learned is None:
            raise InvalidArgument(
                f"{what} needs a table that counts its labels: create it with count_labels", field="sampler.kind"
            )
        return self._learned


def is_learned(spec: SamplerSpec) -> bool:
    """Whether a sampler draws by learned counts."""
    parts = (spec.mixture.first, spec.mixture.second) if spec.mixture is not None else (spec,)
    return any(part.kind == "learned_unigram" for part in parts)
