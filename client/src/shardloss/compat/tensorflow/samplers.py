"""TensorFlow 2.21's candidate sampler functions on torch tensors, with its parameter names, order and defaults.

    sampled_values = log_uniform_candidate_sampler(labels, 1, num_sampled, True, range_max=V, seed=7)
    loss = sampled_softmax_loss(table, table, labels, inputs, num_sampled, V, sampled_values=sampled_values)

TensorFlow keeps one kernel for each set of attributes; likewise the process keeps one `CandidateSampler` for each.
Calls with equal attributes continue one stream of draws, and update the same learned counts. A sampler is kept until
the process ends: for many samplers, or separate streams, create `CandidateSampler` objects instead. name has no effect
in any of the functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardloss.compat.arguments import class_ids, flag, real, whole
from shardloss.compat.tensorflow.arguments import matrix_of
from shardloss.compat.tensorflow.candidate_sampler import (
    AllCandidateSampler,
    CandidateSampler,
    FixedUnigramCandidateSampler,
    LearnedUnigramCandidateSampler,
    LogUniformCandidateSampler,
    SampledCandidates,
    UniformCandidateSampler,
)
from shardloss.compat.tensorflow.sampled import Lists
from shardloss.compat.tensorflow.vocabulary import text_of, unigrams_of
from shardloss.errors import InvalidArgument

_samplers: dict[tuple[Hashable, ...], CandidateSampler] = {}
_samplers_lock = threading.Lock()


def sampler_of(kind: Callable[..., CandidateSampler], **attributes: Hashable) -> CandidateSampler:
    """Return the only sampler in this process of a kind with these attributes."""
    key = (kind, *attributes.items())
    with _samplers_lock:
        if key not in _samplers:
            _samplers[key] = kind(**attributes)
        return _samplers[key]


def attributes_of(num_true: int, num_sampled: int, unique: bool, seed: int | None) -> dict[str, Hashable]:
    """Return the attributes that all samplers have, in one form each, so that 2 and 2.0 share a sampler."""
    return {
        "num_true": whole(num_true, "num_true"),
        "num_sampled": whole(num_sampled, "num_sampled"),
        "unique": flag(unique, "unique"),
        "seed": None if seed is None else whole(seed, "seed"),
    }


def uniform_candidate_sampler(
    true_classes: Lists,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    seed: int | None = None,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> SampledCandidates:
    """Draw num_sampled ids of [0, range_max) with equal probability; they are distinct if unique.

    true_classes [N, num_true] are only the classes whose expected counts are returned. With seed None, the first of
    several equal calls draws a seed from torch's generator.

    Raises:
        InvalidArgument: an argument is out of range, or too few distinct ids are found.
    """
    attributes = attributes_of(num_true, num_sampled, unique, seed)
    return sampler_of(UniformCandidateSampler, range_max=whole(range_max, "range_max"), **attributes)(true_classes)


def log_uniform_candidate_sampler(
    true_classes: Lists,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    seed: int | None = None,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> SampledCandidates:
    """Draw as `uniform_candidate_sampler` does, but with p(k) = log((k + 2) / (k + 1)) / log(range_max + 1)."""
    attributes = attributes_of(num_true, num_sampled, unique, seed)
    return sampler_of(LogUniformCandidateSampler, range_max=whole(range_max, "range_max"), **attributes)(true_classes)


def learned_unigram_candidate_sampler(
    true_classes: Lists,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    seed: int | None = None,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> SampledCandidates:
    """Draw as `uniform_candidate_sampler` does, but with p ~ 1 + a class's count in earlier true_classes.

    Calls with equal attributes update one set of counts, 16 to 24 bytes per class.
    """
    attributes = attributes_of(num_true, num_sampled, unique, seed)
    return sampler_of(LearnedUnigramCandidateSampler, range_max=whole(range_max, "range_max"), **attributes)(
        true_classes
    )


def fixed_unigram_candidate_sampler(
    true_classes: Lists,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    vocab_file: str | bytes | None = "",
    distortion: float | None = 1.0,
    num_reserved_ids: int | None = 0,
    num_shards: int | None = 1,
    shard: int | None = 0,
    unigrams: Lists | None = (),
    seed: int | None = None,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> SampledCandidates:
    """Draw as `uniform_candidate_sampler` does, but with p ~ count**distortion.

    The counts are unigrams, or the last comma-separated field of each line of vocab_file, which is read once; pass
    exactly one of the two. The ids below num_reserved_ids have no count and p = 0. With num_shards > 1 the ids are
    local to the shard (see `Vocabulary.distribution`), and range_max is the number of the shard's ids. Every call
    compares unigrams with those of earlier calls: with millions of them, keep a `FixedUnigramCandidateSampler`.

    Raises:
        InvalidArgument: as in `uniform_candidate_sampler`; or the counts are missing, given twice, negative, not
            finite, all zero, or their number does not fit range_max.
    """
    sampler = sampler_of(
        FixedUnigramCandidateSampler,
        range_max=whole(range_max, "range_max"),
        vocab_file=text_of(vocab_file),
        distortion=1.0 if distortion is None else real(distortion, "distortion"),
        num_reserved_ids=0 if num_reserved_ids is None else whole(num_reserved_ids, "num_reserved_ids"),
        num_shards=1 if num_shards is None else whole(num_shards, "num_shards"),
        shard=0 if shard is None else whole(shard, "shard"),
        unigrams=unigrams_of(unigrams),
        **attributes_of(num_true, num_sampled, unique, seed),
    )
    return sampler(true_classes)


def all_candidate_sampler(
    true_classes: Lists,
    num_true: int,
    num_sampled: int,
    unique: bool,
    seed: int | None = None,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> SampledCandidates:
    """Return every class of [0, num_sampled) in order, with expected count 1; unique and seed have no effect."""
    return sampler_of(AllCandidateSampler, **attributes_of(num_true, num_sampled, unique, seed))(true_classes)


class AccidentalHits(NamedTuple):
    """The H true classes that were also sampled.

    indices [H] int32 are their rows in true_classes, ids [H] int64 are their places in sampled_candidates, and
    weights [H] are -FLT_MAX.
    """

    indices: Tensor
    ids: Tensor
    weights: Tensor


def compute_accidental_hits(
    true_classes: Lists,
    sampled_candidates: Lists,
    num_true: int,
    seed: int | None = None,  # noqa: ARG001  (accepted, without effect)
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> AccidentalHits:
    """Find the true classes [N, num_true] among the sampled ids [S]; a repeated id counts at its last place.

    Hits are in the order of rows and their columns; a class that occurs twice in one row has two hits. seed and name
    have no effect. Source: TensorFlow 2.21, ComputeAccidentalHitsOp.

    Raises:
        InvalidArgument: true_classes is not [N, num_true] of class ids, or sampled_candidates not [S] of class ids.
    """
    labels = matrix_of(true_classes, whole(num_true, "num_true"))
    sampled = class_ids(sampled_candidates, "sampled_candidates", lists=True).cpu().numpy()
    if sampled.ndim != 1:
        raise InvalidArgument(
            f"sampled_candidates has shape {list(sampled.shape)}; [S] is needed", field="sampled_candidates"
        )
    true_ids, device = labels.cpu().numpy(), labels.device
    ids, from_end = np.unique(sampled[::-1], return_index=True)
    is_hit = np.isin(true_ids, ids)
    places = len(sampled) - 1 - from_end[np.searchsorted(ids, true_ids[is_hit])]
    rows = torch.from_numpy(is_hit.nonzero()[0].astype(np.int32))
    weights = torch.full(rows.shape, torch.finfo(torch.float32).min)
    tensors = (rows, torch.from_numpy(places.astype(np.int64)), weights)
    return AccidentalHits(*(tensor.to(device) for tensor in tensors))
