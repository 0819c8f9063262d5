"""TensorFlow's candidate samplers as objects: `shardloss.sampling` with a seed and a counter of calls.

sampler = UniformCandidateSampler(num_true=1, num_sampled=4096, unique=True, range_max=V, seed=7)
sampled, true_expected_count, sampled_expected_count = sampler(true_classes)    # step 0
sampled, true_expected_count, sampled_expected_count = sampler(true_classes)    # step 1
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardloss import sampling
from shardloss.autograd import fresh_seed
from shardloss.compat.arguments import at_least, check_range, flag, real, whole
from shardloss.compat.tensorflow.arguments import matrix_of
from shardloss.compat.tensorflow.sampled import Lists
from shardloss.compat.tensorflow.vocabulary import Vocabulary, text_of, unigrams_of
from shardloss.errors import InvalidArgument, LimitExceeded


class SampledCandidates(NamedTuple):
    """A draw: sampled_candidates [S] int64, and float32 expected counts of true_classes [N, T] and of the draw [S]."""

    sampled_candidates: Tensor
    true_expected_count: Tensor
    sampled_expected_count: Tensor


class CandidateSampler:
    """A sampler with its attributes and state; call it with true_classes [N, num_true].

    The k-th call, counted from 0, draws step k of seed; a refused call is not counted. seed is reduced modulo 2^64;
    with None it is drawn once from torch's generator. Calls from several threads run one after the other. The results
    are on the device of true_classes.

    Raises:
        InvalidArgument: true_classes is not [N, num_true] of ids in [0, range_max), or too few distinct ids are found.
        LimitExceeded: the draw does not fit in memory.
    """

    def __init__(
        self, distribution: sampling.Distribution, num_true: int, num_sampled: int, unique: bool, seed: int | None
    ) -> None:
        self.num_true = at_least(1, num_true, "num_true")
        self.num_sampled = at_least(1, num_sampled, "num_sampled")
        self.unique = flag(unique, "unique")
        self.seed = (fresh_seed() if seed is None else whole(seed, "seed")) % 2**64
        self._distribution = distribution
        self._step = 0
        self._lock = threading.Lock()
        if self.unique and self.num_sampled > distribution.num_possible:
            raise InvalidArgument(
                f"num_sampled = {self.num_sampled} distinct ids cannot be drawn from {distribution.num_possible} "
                f"classes with p > 0; draw fewer, or pass unique=False",
                field="num_sampled",
            )

    def __call__(self, true_classes: Lists) -> SampledCandidates:
        labels = matrix_of(true_classes, self.num_true)
        check_range(labels, None, self._distribution.num_classes, "true_classes")
        ids, device = labels.cpu().numpy(), labels.device
        with self._lock:
            try:
                draw = self._draw()
            except MemoryError:
                raise LimitExceeded(
                    f"num_sampled = {self.num_sampled} ids do not fit in memory; draw fewer", field="num_sampled"
                ) from None
            counts = [self._expected_count(class_ids, draw.num_tries) for class_ids in (ids, draw.sampled)]
            self._saw(ids)
            self._step += 1
        true_count, sampled_count = (torch.from_numpy(count.astype(np.float32)) for count in counts)
        tensors = (torch.from_numpy(draw.sampled), true_count, sampled_count)
        return SampledCandidates(*(tensor.to(device) for tensor in tensors))

    def _draw(self) -> sampling.Draw:
        """Draw the candidates of the current step."""
        try:
            return sampling.draw(self._distribution, self.num_sampled, self.unique, self.seed, self._step)
        except sampling.TriesExhausted:
            raise InvalidArgument(
                f"num_sampled = {self.num_sampled} distinct ids take more than {sampling.max_tries(self.num_sampled)} "
                f"draws; draw fewer, or pass unique=False",
                field="num_sampled",
            ) from None

    def _expected_count(self, class_ids: NDArray[np.int64], num_tries: int) -> NDArray[np.float64]:
        """Return Q of class ids of any shape."""
        return sampling.expected_count(self._distribution, class_ids, self.num_sampled, self.unique, num_tries)

    def _saw(self, true_classes: NDArray[np.int64]) -> None:
        """Learn from a call's true classes after sampling; this class learns nothing."""


class UniformCandidateSampler(CandidateSampler):
    """A sampler with p = 1 / range_max."""

    def __init__(self, num_true: int, num_sampled: int, unique: bool, range_max: int, seed: int | None = None) -> None:
        distribution = sampling.uniform(at_least(1, range_max, "range_max"))
        super().__init__(distribution, num_true, num_sampled, unique, seed)


class LogUniformCandidateSampler(CandidateSampler):
    """A sampler with p(k) = log((k + 2) / (k + 1)) / log(range_max + 1)."""

    def __init__(self, num_true: int, num_sampled: int, unique: bool, range_max: int, seed: int | None = None) -> None:
        distribution = sampling.log_uniform(at_least(1, range_max, "range_max"))
        super().__init__(distribution, num_true, num_sampled, unique, seed)


class LearnedUnigramCandidateSampler(CandidateSampler):
    """A sampler with p ~ 1 + the count of a class in true_classes of earlier calls; a call learns after sampling."""

    def __init__(self, num_true: int, num_sampled: int, unique: bool, range_max: int, seed: int | None = None) -> None:
        try:
            self._counts = sampling.LearnedCounts(at_least(1, range_max, "range_max"))
        except MemoryError:
            raise LimitExceeded(f"counts of {range_max} classes do not fit in memory", field="range_max") from None
        super().__init__(self._counts, num_true, num_sampled, unique, seed)

    def _saw(self, true_classes: NDArray[np.int64]) -> None:
        self._counts.add(true_classes)


class FixedUnigramCandidateSampler(CandidateSampler):
    """A sampler with p ~ count**distortion, counts from vocab_file or unigrams; reserved ids are first and have p = 0.

    The arguments are those of `shardloss.compat.tensorflow.fixed_unigram_candidate_sampler`.
    """

    def __init__(
        self,
        num_true: int,
        num_sampled: int,
        unique: bool,
        range_max: int,
        vocab_file: str = "",
        distortion: float = 1.0,
        num_reserved_ids: int = 0,
        num_shards: int = 1,
        shard: int = 0,
        unigrams: Lists = (),
        seed: int | None = None,
    ) -> None:
        range_max = at_least(1, range_max, "range_max")
        vocabulary = Vocabulary(text_of(vocab_file), unigrams_of(unigrams))
        num_reserved, num_parts, part = (
            at_least(least, value, field)
            for least, value, field in (
                (0, num_reserved_ids, "num_reserved_ids"),
                (1, num_shards, "num_shards"),
                (0, shard, "shard"),
            )
        )
        distribution = vocabulary.distribution(real(distortion, "distortion"), num_reserved, num_parts, part)
        if distribution.num_classes != range_max:
            raise InvalidArgument(
                f"range_max = {range_max}, but this shard has {distribution.num_classes} reserved ids and counts",
                field="range_max",
            )
        super().__init__(distribution, num_true, num_sampled, unique, seed)


class AllCandidateSampler(CandidateSampler):
    """A sampler of every class of [0, num_sampled), in order, with expected count 1; unique and seed have no effect."""

    def __init__(self, num_true: int, num_sampled: int, unique: bool, seed: int | None = None) -> None:
        distribution = sampling.uniform(at_least(1, num_sampled, "num_sampled"))
        super().__init__(distribution, num_true, num_sampled, unique, 0 if seed is None else seed)

    def _draw(self) -> sampling.Draw:
        return sampling.all_candidates(self.num_sampled)

    def _expected_count(self, class_ids: NDArray[np.int64], num_tries: int) -> NDArray[np.float64]:  # noqa: ARG002
        return np.ones(class_ids.shape)
