"""Word counts for TensorFlow's fixed unigram sampler: from a file or a list, split into shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from shardloss import sampling
from shardloss.compat.arguments import tensor_of
from shardloss.compat.tensorflow.sampled import Lists
from shardloss.errors import InvalidArgument


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The counts of words in order, without reserved ids: from vocab_file, or from unigrams if vocab_file is ""."""

    vocab_file: str
    unigrams: tuple[float, ...]

    def distribution(
        self, distortion: float, num_reserved_ids: int, num_shards: int, shard: int
    ) -> sampling.FixedUnigram:
        """Return p ~ count**distortion over the ids of a shard: first its reserved ids with p = 0, then its words.

        A shard has the reserved ids k with k mod num_shards = shard, say R of them, and the words j with
        (R + j) mod num_shards = shard. This is TensorFlow's rule (its kernel counts words from the shard's own R).
        Without reserved ids, or with equally many on each shard, local id i is the global i * num_shards + shard.

        Raises:
            InvalidArgument: not exactly one of vocab_file and unigrams is given, the file cannot be read, or no
                distribution is proportional to the counts.
        """
        if bool(self.vocab_file) == (len(self.unigrams) > 0):
            raise InvalidArgument("pass exactly one of vocab_file and unigrams", field=self.field)
        if not 0 <= shard < num_shards:
            raise InvalidArgument(f"shard = {shard} is outside [0, num_shards = {num_shards})", field="shard")
        num_reserved = len(range(shard, num_reserved_ids, num_shards))
        counts = self.counts((shard - num_reserved) % num_shards, num_shards)
        if not len(counts):
            raise InvalidArgument("this shard has no counts: there is nothing to draw", field=self.field)
        try:
            return sampling.fixed_unigram(np.concatenate([np.zeros(num_reserved), counts]), distortion, num_reserved)
        except InvalidArgument as error:
            field = self.field if error.field == "counts" else error.field
            raise InvalidArgument(f"{self.field}: {error.message}", field=field) from None

    @property
    def field(self) -> str:
        """The name of the argument that has the counts."""
        return "vocab_file" if self.vocab_file else "unigrams"

    def counts(self, first: int, stride: int) -> NDArray[np.float64]:
        """Return the counts of the words first, first + stride, ..."""
        if self.vocab_file:
            return np.fromiter(read_counts(self.vocab_file, first, stride), dtype=np.float64)
        return np.asarray(self.unigrams[first::stride], dtype=np.float64)


def text_of(vocab_file: str | bytes | None) -> str:
    """Return the path of a file, "" for none."""
    if not isinstance(vocab_file, (str, bytes, type(None))):
        raise InvalidArgument(f"vocab_file is a {type(vocab_file).__name__}; a path is needed", field="vocab_file")
    return os.fsdecode(vocab_file or "")


def unigrams_of(unigrams: Lists | None) -> tuple[float, ...]:
    """Return counts, given as a list or a one-dimensional array or tensor, as a tuple; () for None."""
    counts = tensor_of(() if unigrams is None else unigrams, "unigrams", lists=True)
    if counts.dim() != 1 or counts.is_complex():
        raise InvalidArgument(f"unigrams has shape {list(counts.shape)}; [V] numbers are needed", field="unigrams")
    return tuple(counts.tolist())


def read_counts(vocab_file: str, first: int, stride: int) -> Iterator[float]:
    """Yield the last comma-separated field of the lines first, first + stride, ...; empty lines are not counted.

    Raises:
        InvalidArgument: the file cannot be read, or such a field is not a number.
    """
    try:
        with open(vocab_file, encoding="utf-8", errors="replace") as file:
            words = (line for line in file if line.strip())
            for line in islice(words, first, None, stride):
                yield count_of(line)
    except OSError as error:
        raise InvalidArgument(
            f"vocab_file {vocab_file!r} cannot be read: {error.strerror}", field="vocab_file"
        ) from None


def count_of(line: str) -> float:
    """Return the last comma-separated field of a line as a number."""
    try:
        return float(line.rpartition(",")[2])
    except ValueError:
        raise InvalidArgument(
            f"vocab_file has the line {line.strip()[:80]!r}, whose last field is not a number", field="vocab_file"
        ) from None
