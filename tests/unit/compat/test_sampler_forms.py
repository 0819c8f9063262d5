"""The samplers, hits and top k answer the argument forms that TensorFlow 2.21 answers, and refuse the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from shardloss.compat import tensorflow
from shardloss.errors import InvalidArgument
from torch import Tensor

N, T, S, V = 7, 2, 5, 23
Given = dict[str, Any]
LABELS = torch.arange(N * T).reshape(N, T) * 3 % V
SAMPLED = torch.tensor([3, 7, 3, 0, 9])  # all are labels, and 3 is repeated
SCORES = torch.linspace(-1.0, 1.0, N * 4).reshape(N, 4)
SAMPLERS: dict[str, Callable[..., tensorflow.SampledCandidates]] = {
    "uniform": tensorflow.uniform_candidate_sampler,
    "log_uniform": tensorflow.log_uniform_candidate_sampler,
    "learned": tensorflow.learned_unigram_candidate_sampler,
    "fixed": tensorflow.fixed_unigram_candidate_sampler,
    "all": tensorflow.all_candidate_sampler,
}


def sample(kind: str, seed: int, **given: Any) -> tensorflow.SampledCandidates:
    """Return the next draw of a sampler with good arguments, except for those given."""
    arguments: Given = {"true_classes": LABELS, "num_true": T, "num_sampled": S, "unique": True}
    arguments.update({"num_sampled": V} if kind == "all" else {"range_max": V})
    if kind == "fixed":
        arguments["unigrams"] = [1.0] * V
    return SAMPLERS[kind](**{**arguments, "seed": seed, **given})


ANSWERED: list[Given] = [
    {"true_classes": LABELS.numpy()},
    {"true_classes": LABELS.tolist()},
    {"true_classes": LABELS.numpy().astype(np.uint8)},
    {"true_classes": LABELS.numpy().astype(np.float32)},
    {"true_classes": LABELS.int()},
    {"num_true": 2.0},
    {"num_true": np.int32(2)},
    {"num_true": torch.tensor(2)},
    {"unique": np.bool_(True)},
    {"name": "draw"},
]
COUNTED: list[Given] = [{"num_sampled": 5.0}, {"num_sampled": np.array(5)}, {"range_max": float(V)}]
FIXED: list[Given] = [
    {"unigrams": np.ones(V)},
    {"unigrams": [1] * V},
    {"unigrams": (1.0,) * V},
    {"distortion": None},
    {"distortion": 1},
    {"distortion": np.float32(1)},
    {"num_reserved_ids": None},
    {"num_reserved_ids": 0.0},
    {"num_shards": None},
    {"num_shards": np.int64(1)},
    {"shard": None},
    {"vocab_file": None},
    {"vocab_file": b""},
]
CASES = [(kind, given) for kind in SAMPLERS for given in ANSWERED + (COUNTED if kind != "all" else [])]


@pytest.mark.parametrize("kind, given", CASES + [("fixed", given) for given in FIXED], ids=", ".join)
def test_a_sampler_answers_the_forms_that_tensorflow_answers(kind: str, given: Given) -> None:
    """The first draw of a seed is the same in both forms, and a second one continues the stream of the first."""
    seed = int(torch.randint(0, 2**62, ()))
    plain = [sample(kind, seed), sample(kind, seed)]
    same_seed = seed + 2**64  # with a sampler of its own
    found = [sample(kind, same_seed, **given), sample(kind, same_seed)]
    for ours, theirs in zip(found, plain, strict=True):
        assert all(map(torch.equal, ours, theirs))


REFUSED: list[tuple[str, Given]] = [
    ("true_classes", {"true_classes": None}),
    ("true_classes", {"true_classes": LABELS + 0.5}),
    ("true_classes", {"true_classes": LABELS - 1}),
    ("true_classes", {"true_classes": LABELS[:, 0]}),
    ("true_classes", {"true_classes": [[1, 2], [3]]}),
    ("num_true", {"num_true": None}),
    ("num_true", {"num_true": "2"}),
    ("num_true", {"num_true": 2.5}),
    ("num_sampled", {"num_sampled": None}),
    ("num_sampled", {"num_sampled": 0}),
    ("num_sampled", {"num_sampled": [5]}),
    ("unique", {"unique": None}),
    ("unique", {"unique": "yes"}),
    ("unique", {"unique": []}),
    ("seed", {"seed": "a"}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": [1, 2]}),
]
NOT_FIXED: list[tuple[str, Given]] = [
    ("unigrams", {"unigrams": None}),
    ("unigrams", {"unigrams": iter([1.0])}),
    ("unigrams", {"unigrams": ["1"] * V}),
    ("unigrams", {"unigrams": [[1.0] * V]}),
    ("distortion", {"distortion": "1"}),
    ("num_reserved_ids", {"num_reserved_ids": "0"}),
    ("num_shards", {"num_shards": 1.5}),
    ("shard", {"shard": -1}),
    ("vocab_file", {"vocab_file": 5}),
]
WRONG = [(kind, *row) for kind in SAMPLERS for row in REFUSED] + [("fixed", *row) for row in NOT_FIXED]


@pytest.mark.parametrize("kind, field, given", WRONG, ids=", ".join)
def test_a_sampler_refuses_any_other_form_by_the_callers_name(kind: str, field: str, given: Given) -> None:
    with pytest.raises(InvalidArgument, match=field) as refused:
        sample(kind, **{"seed": 5, **given})
    assert refused.value.field == field


@pytest.mark.parametrize(
    "given",
    [
        {"true_classes": LABELS.numpy().astype(np.uint8)},
        {"true_classes": LABELS.tolist()},
        {"true_classes": LABELS.double()},
        {"sampled_candidates": SAMPLED.tolist()},
        {"sampled_candidates": SAMPLED.numpy().astype(np.float32)},
        {"num_true": 2.0},
        {"seed": 1.5},
    ],
    ids=", ".join,
)
def test_accidental_hits_are_found_in_the_forms_that_tensorflow_answers(given: Given) -> None:
    plain: Given = {"true_classes": LABELS, "sampled_candidates": SAMPLED, "num_true": T}
    ours, theirs = (tensorflow.compute_accidental_hits(**each) for each in ({**plain, **given}, plain))
    assert all(map(torch.equal, ours, theirs))
    assert len(theirs.ids) == 4


@pytest.mark.parametrize(
    "given",
    [
        {"targets": (LABELS[:, 0] % 4).numpy()},
        {"targets": (LABELS[:, 0] % 4).tolist()},
        {"targets": (LABELS[:, 0] % 4).float()},
        {"predictions": SCORES.numpy()},
        {"predictions": SCORES.tolist()},
        {"k": np.float32(2)},
        {"k": torch.tensor(2)},
    ],
    ids=", ".join,
)
def test_in_top_k_answers_the_forms_that_tensorflow_answers(given: Given) -> None:
    plain: Given = {"targets": LABELS[:, 0] % 4, "predictions": SCORES, "k": 2}
    found: list[Tensor] = [tensorflow.in_top_k(**each) for each in ({**plain, **given}, plain)]
    assert torch.equal(*found)
    assert 0 < int(found[1].sum()) < N


def test_in_top_k_of_arrays_rounds_to_float32_as_tensorflow_does() -> None:
    """Two predictions that differ by less than float32 can show tie, so both are in the top 1."""
    array = np.array([[1.0, 1.0 + 1e-12]])
    assert tensorflow.in_top_k([0], array, 1).tolist() == [True]
    assert tensorflow.in_top_k([0], torch.from_numpy(array), 1).tolist() == [False]
