"""Class counts of a table: those written by the caller, and those learned from commits."""

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

KEPT_ALIASES = 2  # prepared unigrams, by (distortion, num_reserved_ids); each takes 24 bytes per class
KEPT_MIXTURES = 16  # mixtures whose num_possible is remembered


@dataclass(frozen=True, slots=True)
class CountsRead:
    """Counts of a range of M classes, and the table's version when they were read.

    written [M] is None if no counts were ever written; learned [M] is None if the table does not count its labels.
    """

    written: NDArray[np.float64] | None
    learned: NDArray[np.int64] | None
    version: int


class ClassCounts:
    """The class counts of one table, and the distributions that its samplers draw from. Thread-safe.

    A draw and its expected counts must be computed inside one `unchanging` context. Written counts [V] are set by
    WriteClassCounts and are 0 before. Learned counts are kept only if the table counts its labels: 1 for each class,
    plus 1 for each label of a commit.
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
        """Yield the distribution of a sampler at this moment; learned counts stay locked inside the context.

        Raises:
            InvalidArgument: the sampler needs counts that do not exist.
        """
        with self._lock:
            distribution = self.distribution(spec)
            if is_learned(spec):
                yield distribution
                return
        yield distribution  # immutable, so other calls need not wait for a long draw

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
            InvalidArgument: the table does not count its labels, or the sum of all counts would exceed MAX_TOTAL.
        """
        with self._lock:
            self._of_labels("learned").overwrite(first_class, counts)
            self._num_possible.clear()

    def read(self, first_class: int, num_classes: int) -> tuple[NDArray[np.float64] | None, NDArray[np.int64] | None]:
        """Return copies of the written and the learned counts [M] of a range of classes; None for those not kept."""
        asked = slice(first_class, first_class + num_classes)
        with self._lock:
            written = None if self._written is None else self._written[asked].copy()
            if self._learned is None:
                return written, None
            return written, self._learned.frequency(np.arange(asked.start, asked.stop))

    def learn(self, class_ids: NDArray[np.int64]) -> None:
        """Add the labels of a commit to the learned counts, if these are kept."""
        if self._learned is not None:
            with self._lock:
                self._learned.add(class_ids)

    def learned_frequency(self, class_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each class's share of all labels seen by commits, with one extra label added per class.

        Raises:
            InvalidArgument: the table does not count its labels.
        """
        with self._lock:
            return self._of_labels("in_batch").probability(class_ids)

    def distribution(self, spec: SamplerSpec) -> Distribution:
        """Return the distribution that a sampler draws from at this moment.

        Raises:
            InvalidArgument: the sampler needs counts that do not exist.
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
        if of not in self._num_possible:  # counting them reads every class if both are unigrams
            while len(self._num_possible) >= KEPT_MIXTURES:
                self._num_possible.pop(next(iter(self._num_possible)))
            self._num_possible[of] = sampling.mixture(first, second, of.share).num_possible
        return sampling.Mixture(first, second, of.share, self._num_possible[of])

    def _unigram(self, spec: SamplerSpec) -> Distribution:
        key = (spec.distortion, spec.num_reserved_ids)
        if key not in self._unigrams:
            if self._written is None or not self._written[spec.num_reserved_ids :].any():
                raise InvalidArgument(
                    "fixed_unigram needs class counts above 0; write them first",
                    field="sampler.kind",
                )
            while len(self._unigrams) >= KEPT_ALIASES:
                self._unigrams.pop(next(iter(self._unigrams)))
            self._unigrams[key] = sampling.fixed_unigram(self._written, spec.distortion, spec.num_reserved_ids)
        return self._unigrams[key]

    def _of_labels(self, what: str) -> LearnedCounts:
        if self._learned is None:
            raise InvalidArgument(
                f"{what} needs a table that counts its labels; create the table with count_labels", field="sampler.kind"
            )
        return self._learned


def is_learned(spec: SamplerSpec) -> bool:
    """Return True if a sampler draws from learned counts."""
    parts = (spec.mixture.first, spec.mixture.second) if spec.mixture is not None else (spec,)
    return any(part.kind == "learned_unigram" for part in parts)
