"""Our samplers count and draw as TensorFlow's and Paddle's do, in every case of the index."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shardloss import sampling
from shardloss.compat import tensorflow
from shardloss.compat.tensorflow.vocabulary import Vocabulary

from ..statistical.frequencies import assert_same_frequencies, two_sample_z
from .cases import Case, load

FLOAT32 = 5e-6  # the README's tolerance, here relative to each entry
KINDS = ("all", "fixed_unigram", "log_uniform", "uniform")
Counts = NDArray[np.float64]


def kind_of(case: Case) -> str:
    """Return the sampler's kind, from the op's name."""
    return str(case.meta["op"]).removeprefix("tf.random.").removesuffix("_candidate_sampler")


def fixed_unigram_arguments(case: Case) -> dict[str, object]:
    """Return the arguments that only the fixed unigram sampler takes."""
    return {
        "distortion": case.meta["distortion"],
        "num_reserved_ids": case.meta["num_reserved_ids"],
        "num_shards": case.meta.get("num_shards", 1),
        "shard": case.meta.get("shard", 0),
        "unigrams": case["unigrams"].tolist(),
    }


def distribution_of(case: Case) -> sampling.Distribution:
    """Return the distribution that a case draws from."""
    if kind_of(case) != "fixed_unigram":
        return sampling.DISTRIBUTIONS[kind_of(case)](case.meta["range_max"])
    given = fixed_unigram_arguments(case)
    vocabulary = Vocabulary("", given.pop("unigrams"))  # type: ignore[arg-type]
    return vocabulary.distribution(**given)  # type: ignore[arg-type]


def expected_probability(case: Case) -> Counts:
    """Return p [range_max] as TensorFlow documents it."""
    ids = np.arange(case.meta["range_max"])
    if kind_of(case) == "uniform":
        return np.full(len(ids), 1 / len(ids))
    if kind_of(case) == "log_uniform":
        return np.array([math.log((k + 2) / (k + 1)) / math.log(len(ids) + 1) for k in ids])
    num_shards, shard = case.meta.get("num_shards", 1), case.meta.get("shard", 0)
    weights = [0.0 for k in range(case.meta["num_reserved_ids"]) if k % num_shards == shard]
    for word_id, count in enumerate(case["unigrams"], start=len(weights)):  # the kernel's start, not the documented one
        if word_id % num_shards == shard:
            weights.append(count ** case.meta["distortion"])
    return np.array(weights) / sum(weights)


def tries_of(count: Counts, p: Counts, num_sampled: int) -> int:
    """Return the number of tries of a distinct draw, solved from its best-conditioned expected count."""
    if np.allclose(count, p * num_sampled, rtol=FLOAT32, atol=0):
        return num_sampled  # the first S draws were distinct: Q = p * S
    at = int(np.abs(count - 0.5).argmin())
    tries = math.log1p(-count[at]) / math.log1p(-p[at])
    assert tries == pytest.approx(round(tries), rel=1e-4)
    return round(tries)


def random_cases() -> list[Case]:
    """Return the cases of the samplers that draw at random."""
    return [case for case in load("tf_candidate_sampler") if kind_of(case) != "all"]


def all_cases() -> list[Case]:
    """Return the cases of the sampler that returns every class."""
    return [case for case in load("tf_candidate_sampler") if kind_of(case) == "all"]


candidate_sampler = pytest.mark.parametrize("case", random_cases(), ids=str)


def test_the_index_has_every_family_and_kind() -> None:
    """Every comparison below has cases."""
    assert {kind_of(case) for case in load("tf_candidate_sampler")} == set(KINDS)
    for family in ("tf_learned_unigram", "tf_accidental_hits", "paddle_class_center_sample"):
        assert load(family)


@candidate_sampler
def test_expected_counts_equal_tensorflows(case: Case) -> None:
    """Q of every class and of every drawn id equals TensorFlow's in each recorded call."""
    distribution, ids = distribution_of(case), case["true_classes"][:, 0]
    p, num_sampled, unique = expected_probability(case)[ids], case.meta["num_sampled"], case.meta["unique"]
    for sampled, true_count, sampled_count in zip(
        case["sampled"], case["true_expected_count"], case["sampled_expected_count"], strict=True
    ):
        num_tries = tries_of(true_count.astype(np.float64), p, num_sampled) if unique else num_sampled
        for class_ids, count in ((ids, true_count), (sampled, sampled_count)):
            ours = sampling.expected_count(distribution, class_ids, num_sampled, unique, num_tries)
            np.testing.assert_allclose(ours, count, rtol=FLOAT32, atol=0)


def call(case: Case, seed: int) -> tensorflow.SampledCandidates:
    """Call our function for the case's op with the case's arguments."""
    function = getattr(tensorflow, str(case.meta["op"]).rpartition(".")[2])
    true_classes = torch.from_numpy(case["true_classes"])
    own = fixed_unigram_arguments(case) if kind_of(case) == "fixed_unigram" else {}
    if kind_of(case) != "all":
        own["range_max"] = case.meta["range_max"]
    values: tensorflow.SampledCandidates = function(
        true_classes, 1, case.meta["num_sampled"], case.meta["unique"], seed=seed, **own
    )
    return values


@candidate_sampler
def test_the_functions_give_what_tensorflows_give(case: Case) -> None:
    """Shapes and dtypes are equal, ids have p > 0 and are distinct if requested, and one num_tries fits all counts."""
    p, num_sampled = expected_probability(case), case.meta["num_sampled"]
    for seed in range(5):
        values = call(case, seed)
        sampled, true_count, sampled_count = (tensor.numpy() for tensor in values)
        for ours, name in zip(values, ("sampled", "true_expected_count", "sampled_expected_count"), strict=True):
            assert ours.numpy().dtype == case[name].dtype
        assert sampled.shape == case["sampled"].shape[1:]
        assert true_count.shape == case["true_classes"].shape
        assert (p[sampled] > 0).all()
        assert not case.meta["unique"] or len(set(sampled.tolist())) == num_sampled
        count = np.zeros(len(p))
        count[case["true_classes"][:, 0]] = true_count[:, 0]
        num_tries = tries_of(count, p, num_sampled) if case.meta["unique"] else num_sampled
        expected = p * num_sampled if num_tries == num_sampled else -np.expm1(num_tries * np.log1p(-p))
        np.testing.assert_allclose(count, expected, rtol=FLOAT32, atol=0)
        np.testing.assert_array_equal(sampled_count, count[sampled])


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_all_candidates_are_tensorflows(case: Case) -> None:
    """Every class is returned in order, each with Q = 1."""
    values = call(case, 0)
    np.testing.assert_array_equal(values.sampled_candidates.numpy(), case["sampled"][0])
    np.testing.assert_array_equal(values.true_expected_count.numpy()[:, 0], case["true_expected_count"][0])
    np.testing.assert_array_equal(values.sampled_expected_count.numpy(), case["sampled_expected_count"][0])


@pytest.mark.parametrize("case", [case for case in random_cases() if "empirical_frequency" in case], ids=str)
def test_frequencies_are_tensorflows(case: Case) -> None:
    """Draws with repeats, and inclusions in distinct batches, are as frequent as in the framework."""
    distribution, num = distribution_of(case), case.meta["empirical_n"]
    if case.meta["unique"]:
        batches = [sampling.draw(distribution, case.meta["num_sampled"], True, 41, k).sampled for k in range(num)]
        drawn = np.concatenate(batches)
    else:
        drawn = sampling.draw(distribution, num, False, 41, 0).sampled
    ours, theirs = np.bincount(drawn, minlength=case.meta["range_max"]) / num, case["empirical_frequency"]
    possible = expected_probability(case) > 0
    assert not ours[~possible].any()
    assert not theirs[~possible].any()
    assert_same_frequencies(two_sample_z(ours[possible], num, theirs[possible], num))


@pytest.mark.parametrize("case", load("tf_learned_unigram"), ids=str)
def test_learned_counts_equal_tensorflows(case: Case) -> None:
    """Q of each call's true and sampled classes equals TensorFlow's after all earlier calls added their labels."""
    counts = sampling.LearnedCounts(case.meta["range_max"])
    num_sampled, unique = case.meta["num_sampled"], case.meta["unique"]
    for k, true_classes in enumerate(case["true_classes"]):
        class_ids = np.concatenate([true_classes.ravel(), case["sampled"][k]])
        recorded = [case["true_expected_count"][k].ravel(), case["sampled_expected_count"][k]]
        count = np.concatenate(recorded).astype(np.float64)
        num_tries = tries_of(count, counts.probability(class_ids), num_sampled) if unique else num_sampled
        ours = sampling.expected_count(counts, class_ids, num_sampled, unique, num_tries)
        np.testing.assert_allclose(ours, count, rtol=FLOAT32, atol=0)
        counts.add(true_classes)


@pytest.mark.parametrize("case", load("tf_learned_unigram"), ids=str)
def test_the_learned_sampler_learns_as_tensorflows(case: Case) -> None:
    """The same calls in the same order give expected counts that follow from the same p."""
    num_sampled, unique = case.meta["num_sampled"], case.meta["unique"]
    num_true = case["true_classes"].shape[2]
    sampler = tensorflow.LearnedUnigramCandidateSampler(num_true, num_sampled, unique, case.meta["range_max"], seed=5)
    weights = np.ones(case.meta["range_max"])
    for k, true_classes in enumerate(case["true_classes"]):
        values = sampler(torch.from_numpy(true_classes))
        p = weights / weights.sum()
        class_ids = np.concatenate([true_classes.ravel(), values.sampled_candidates.numpy()])
        count = torch.cat([values.true_expected_count.ravel(), values.sampled_expected_count]).double().numpy()
        num_tries = tries_of(count, p[class_ids], num_sampled) if unique else num_sampled
        if num_tries == num_sampled:
            np.testing.assert_allclose(count, (p * num_sampled)[class_ids], rtol=FLOAT32, atol=0)
        else:
            np.testing.assert_allclose(count, -np.expm1(num_tries * np.log1p(-p[class_ids])), rtol=FLOAT32, atol=0)
        if not unique:
            np.testing.assert_allclose(
                values.true_expected_count.numpy(), case["true_expected_count"][k], rtol=FLOAT32, atol=0
            )
        np.add.at(weights, true_classes, 1)


@pytest.mark.parametrize("case", load("tf_accidental_hits"), ids=str)
def test_accidental_hits_are_tensorflows(case: Case) -> None:
    """The rows, places and weights are the same, in the same order and dtypes."""
    hits = tensorflow.compute_accidental_hits(
        torch.from_numpy(case["labels"]), torch.from_numpy(case["sampled"]), case.meta["num_true"]
    )
    for ours, name in zip(hits, ("row", "column", "weight"), strict=True):
        assert ours.numpy().dtype == case[name].dtype
        np.testing.assert_array_equal(ours.numpy(), case[name])


@pytest.mark.parametrize("case", load("paddle_class_center_sample"), ids=str)
def test_class_centers_have_paddles_properties(case: Case) -> None:
    """There are as many ids: Paddle's positives first, at Paddle's places, then distinct ids that are not labels."""
    labels, theirs = case["label"], case["sampled_class_center"]
    num_positives = len(set(labels.tolist()))
    for step in range(7):
        ours = sampling.partial_fc(labels, case.meta["num_classes"], case.meta["num_samples"], 3, step)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours[:num_positives], theirs[:num_positives])
        np.testing.assert_array_equal(np.searchsorted(ours[:num_positives], labels), case["remapped_label"])
        assert len(set(ours.tolist())) == len(ours)
        assert 0 <= ours.min() <= ours.max() < case.meta["num_classes"]
