"""TensorFlow's sampler functions on torch tensors: their state and their checks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shardloss import sampling
from shardloss.compat import tensorflow
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

LABELS = torch.tensor([[3, 0], [7, 3], [10, 3]])


# State


def uniform_draws(num: int, seed: int | None, range_max: int = 173) -> list[list[int]]:
    """Return the samples of `num` calls of uniform_candidate_sampler."""
    calls = [tensorflow.uniform_candidate_sampler(LABELS, 2, 9, True, range_max, seed) for _ in range(num)]
    return [call.sampled_candidates.tolist() for call in calls]


def test_the_kth_call_draws_step_k_from_0() -> None:
    """Call k of a sampler is the draw that the service makes for the same seed and step k, counted from 0."""
    expected = [sampling.draw(sampling.uniform(173), 9, True, 401, step).sampled.tolist() for step in range(3)]
    sampler = tensorflow.UniformCandidateSampler(2, 9, True, 173, seed=401)
    assert [sampler(LABELS).sampled_candidates.tolist() for _ in range(3)] == expected
    assert uniform_draws(3, seed=401) == expected


def test_equal_attributes_share_a_sampler_and_others_do_not() -> None:
    """Equal seeds and ranges share one stream, whether the seed is a Python, NumPy or torch integer; others do not."""
    stream = [sampling.draw(sampling.uniform(173), 9, True, 402, step).sampled.tolist() for step in range(4)]
    assert uniform_draws(1, seed=402) == stream[:1]
    assert uniform_draws(1, seed=403) != stream[:1]
    uniform_draws(1, seed=402, range_max=174)
    assert uniform_draws(1, seed=np.int64(402)) == stream[1:2]  # type: ignore[arg-type]
    assert uniform_draws(1, seed=torch.tensor(402)) == stream[2:3]  # type: ignore[arg-type]
    assert uniform_draws(1, seed=402) == stream[3:]


def test_no_seed_is_drawn_from_torchs_generator_once() -> None:
    """torch.manual_seed determines a sampler's seed; the next sampler has another, and calls without a seed differ."""
    torch.manual_seed(5)
    first = tensorflow.UniformCandidateSampler(2, 9, True, 173)
    second = tensorflow.UniformCandidateSampler(2, 9, True, 173)
    torch.manual_seed(5)
    assert tensorflow.UniformCandidateSampler(2, 9, True, 173).seed == first.seed != second.seed
    calls = uniform_draws(2, seed=None, range_max=181)
    assert calls[0] != calls[1]


def test_a_negative_seed_is_a_seed() -> None:
    """A negative seed is taken modulo 2^64, because seeds have 64 bits on the wire."""
    assert tensorflow.UniformCandidateSampler(2, 9, True, 173, seed=-1).seed == 2**64 - 1


def test_a_refused_call_counts_for_nothing() -> None:
    """A refused call uses no step and adds nothing to the learned counts."""
    sampler = tensorflow.LearnedUnigramCandidateSampler(2, 9, False, 11, seed=3)
    with pytest.raises(InvalidArgument):
        sampler(torch.tensor([[3, 11]]))
    values = sampler(torch.tensor([[3, 3]]))
    assert (
        values.sampled_candidates.tolist() == sampling.draw(sampling.LearnedCounts(11), 9, False, 3, 0).sampled.tolist()
    )
    assert values.true_expected_count.tolist() == [pytest.approx([9 / 11] * 2)]
    assert sampler(torch.tensor([[3, 4]])).true_expected_count.tolist() == [pytest.approx([27 / 13, 9 / 13])]


def test_the_learned_function_learns_over_calls() -> None:
    """Calls with equal attributes share one set of learned counts, which each call updates after it has sampled."""
    counts = []
    for _ in range(3):
        values = tensorflow.learned_unigram_candidate_sampler(torch.tensor([[3, 3]]), 2, 9, False, 11, seed=404)
        counts.append(values.true_expected_count[0, 0].item())
    assert counts == pytest.approx([9 / 11, 27 / 13, 45 / 15])


def test_threads_take_steps_of_their_own() -> None:
    """64 calls from 4 threads draw steps 0 to 63, each once, and all their labels are learned."""
    sampler = tensorflow.LearnedUnigramCandidateSampler(1, 5, False, 11, seed=3)
    stream = tensorflow.UniformCandidateSampler(1, 5, False, 1_000_003, seed=3)
    drawn: list[tuple[int, ...]] = []

    def work() -> None:
        for _ in range(16):
            sampler(torch.tensor([[3]]))
            drawn.append(tuple(stream(torch.tensor([[3]])).sampled_candidates.tolist()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [sampling.draw(sampling.uniform(1_000_003), 5, False, 3, step).sampled for step in range(64)]
    assert sorted(drawn) == sorted(tuple(ids.tolist()) for ids in expected)
    assert sampler(torch.tensor([[3]])).true_expected_count.item() == pytest.approx(5 * 65 / (11 + 64))


def test_int32_labels_are_labels_and_no_rows_are_no_counts() -> None:
    values = tensorflow.log_uniform_candidate_sampler(LABELS.int(), 2, 9, True, 173, seed=405)
    assert [tensor.dtype for tensor in values] == [torch.int64, torch.float32, torch.float32]
    empty = tensorflow.log_uniform_candidate_sampler(LABELS[:0], 2, 9, True, 173, seed=405)
    assert empty.true_expected_count.shape == (0, 2)


# Fixed unigram: the source of the counts


def expected_counts(range_max: int, **arguments: Any) -> list[float]:
    """Return Q / S of every class."""
    ids = torch.arange(range_max)[:, None]
    values = tensorflow.fixed_unigram_candidate_sampler(ids, 1, 4, False, range_max, **arguments)
    return [count / 4 for count in values.true_expected_count[:, 0].tolist()]


@pytest.fixture
def vocab_file(tmp_path: Path) -> str:
    """A file of seven words in lines of one, two or three columns; the last column is the count."""
    path = tmp_path / "words.csv"
    path.write_text('the,1\nof,2.5\n"a, b",x,4\n\n0\nword , 8\n1e1\r\nend,0.5')
    return str(path)


COUNTS = [1, 2.5, 4, 0, 8, 10, 0.5]


def test_a_vocabulary_file_is_its_last_column(vocab_file: str) -> None:
    """The counts are read in order after the reserved ids, without empty lines, and equal those given as a list."""
    weights = np.array([0, 0, *COUNTS]) ** 0.5
    expected = (weights / weights.sum()).tolist()
    arguments = {"distortion": 0.5, "num_reserved_ids": 2}
    assert expected_counts(9, vocab_file=vocab_file, **arguments) == pytest.approx(expected, rel=1e-6)
    for unigrams in (COUNTS, tuple(COUNTS), np.array(COUNTS), torch.tensor(COUNTS)):
        assert expected_counts(9, unigrams=unigrams, **arguments) == pytest.approx(expected, rel=1e-6)


def test_a_shard_has_its_own_ids(vocab_file: str) -> None:
    """Local id i of shard k is id i * num_shards + k, and the counts of other shards are not read."""
    for shard in range(3):
        own = np.array(COUNTS[shard::3])
        arguments: dict[str, Any] = {"num_shards": 3, "shard": shard}
        for source in ({"unigrams": COUNTS}, {"vocab_file": vocab_file}):
            counts = expected_counts(len(own), **arguments, **source)
            assert counts == pytest.approx((own / own.sum()).tolist(), rel=1e-6)


def test_reserved_ids_are_cut_into_shards_as_tensorflow_does() -> None:
    """4 reserved ids over 3 shards are 2, 1 and 1, and each shard's words follow them, as in TensorFlow's kernel."""
    for shard, (num_reserved, words) in enumerate([(2, [2.5, 8]), (1, [1, 0, 0.5]), (1, [2.5, 8])]):
        weights = np.array([0.0] * num_reserved + words)
        arguments: dict[str, Any] = {"num_reserved_ids": 4, "num_shards": 3, "shard": shard, "unigrams": COUNTS}
        assert expected_counts(len(weights), **arguments) == pytest.approx((weights / weights.sum()).tolist())


def test_distortion_0_makes_all_words_equal() -> None:
    """Distortion 0 is uniform, as TensorFlow documents: it includes words of count 0, but not reserved ids."""
    arguments: dict[str, Any] = {"distortion": 0.0, "num_reserved_ids": 1, "unigrams": COUNTS}
    assert expected_counts(8, **arguments) == pytest.approx([0, *[1 / 7] * 7])


# What is refused


def sample(**changes: Any) -> object:
    """Call the fixed unigram sampler with valid arguments, except for the changes."""
    arguments: dict[str, Any] = {
        "true_classes": LABELS, "num_true": 2, "num_sampled": 3, "unique": True, "range_max": 12,
        "num_reserved_ids": 5, "unigrams": COUNTS, "seed": 1,
    }  # fmt: skip
    return tensorflow.fixed_unigram_candidate_sampler(**{**arguments, **changes})


def test_the_call_that_the_refusals_change_is_good() -> None:
    assert isinstance(sample(), tensorflow.SampledCandidates)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"true_classes": LABELS[0]}, "true_classes"),
        ({"true_classes": LABELS[:, :1]}, "true_classes"),
        ({"true_classes": LABELS + 0.5}, "true_classes"),
        ({"true_classes": LABELS - 1}, "true_classes"),
        ({"true_classes": LABELS + 2}, "true_classes"),
        ({"num_true": 0}, "num_true"),
        ({"num_true": 2.5}, "num_true"),
        ({"num_sampled": 0}, "num_sampled"),
        ({"num_sampled": 7}, "num_sampled"),  # 6 classes have p > 0
        ({"range_max": 0}, "range_max"),
        ({"range_max": 11}, "range_max"),
        ({"range_max": "12"}, "range_max"),
        ({"seed": 0.5}, "seed"),
        ({"unigrams": ()}, "unigrams"),
        ({"vocab_file": "words.csv"}, "vocab_file"),  # in addition to unigrams
        ({"vocab_file": "/no/such/file", "unigrams": ()}, "vocab_file"),
        ({"unigrams": [*COUNTS[:-1], -1.0]}, "unigrams"),
        ({"unigrams": [*COUNTS[:-1], float("nan")]}, "unigrams"),
        ({"unigrams": [*COUNTS[:-1], "x"]}, "unigrams"),
        ({"unigrams": [0.0] * 7}, "unigrams"),
        ({"distortion": -1.0}, "distortion"),
        ({"distortion": "half"}, "distortion"),
        ({"num_reserved_ids": -1}, "num_reserved_ids"),
        ({"num_shards": 0}, "num_shards"),
        ({"shard": 1}, "shard"),
        ({"shard": -1}, "shard"),
        ({"num_reserved_ids": 0, "unigrams": [1.0], "num_shards": 2, "shard": 1}, "unigrams"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        sample(**changes)
    assert refused.value.field == field


def test_the_first_label_out_of_range_is_named() -> None:
    with pytest.raises(InvalidArgument) as refused:
        sample(true_classes=torch.tensor([[3, 0], [7, 12], [-1, 3]]))
    assert refused.value.index == "1, 1"


def test_a_vocabulary_line_without_a_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("the,1\nof,many\n")
    with pytest.raises(InvalidArgument, match="of,many") as refused:
        expected_counts(2, vocab_file=str(path))
    assert refused.value.field == "vocab_file"


@pytest.mark.parametrize("make", [tensorflow.UniformCandidateSampler, tensorflow.LearnedUnigramCandidateSampler])
def test_more_distinct_ids_than_classes_are_refused(make: Callable[..., object]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        make(2, 12, True, 11)
    assert refused.value.field == "num_sampled"


def test_a_hopeless_distinct_draw_is_refused() -> None:
    """Drawing all of three classes is refused if the last one has p = 5e-13."""
    sampler = tensorflow.FixedUnigramCandidateSampler(1, 3, True, 3, unigrams=[1.0, 1.0, 1e-12], seed=0)
    with pytest.raises(InvalidArgument) as refused:
        sampler(torch.tensor([[0]]))
    assert refused.value.field == "num_sampled"


# Accidental hits, top k


def naive_hits(labels: Tensor, sampled: Tensor) -> list[tuple[int, int]]:
    """Return hits as the kernel's loops do: map ids to their last place, then go through rows and columns in order."""
    last = {int(k): place for place, k in enumerate(sampled)}
    return [(n, last[int(y)]) for n, row in enumerate(labels) for y in row if int(y) in last]


@pytest.mark.parametrize("num_sampled", [0, 1, 9, 40])
def test_hits_are_the_last_places_of_true_classes(num_sampled: int, rng: np.random.Generator) -> None:
    """A repeated label hits each time, a repeated sample is hit at its last place, and no samples give no hits."""
    labels = torch.from_numpy(rng.integers(0, 13, (7, 3)))
    sampled = torch.from_numpy(rng.integers(0, 13, num_sampled))
    hits = tensorflow.compute_accidental_hits(labels, sampled, 3)
    assert list(zip(hits.indices.tolist(), hits.ids.tolist(), strict=True)) == naive_hits(labels, sampled)
    assert (hits.indices.dtype, hits.ids.dtype, hits.weights.dtype) == (torch.int32, torch.int64, torch.float32)
    assert (hits.weights == torch.finfo(torch.float32).min).all()


def test_hits_of_wrong_shapes_are_refused() -> None:
    for labels, sampled, field in ((LABELS, LABELS, "sampled_candidates"), (LABELS[0], LABELS[0], "true_classes")):
        with pytest.raises(InvalidArgument) as refused:
            tensorflow.compute_accidental_hits(labels, sampled, 2)
        assert refused.value.field == field


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "row, target, expected",
    [
        ([0.5, 2.0, 1.0, 0.0], 2, [False, True, True, True]),
        ([1.0, 2.0, 1.0, 1.0], 3, [False, True, True, True]),  # three tie for the second place: all are in
        ([2.0, 2.0, 2.0, 2.0], 0, [True, True, True, True]),
        ([0.5, 2.0, 1.0, 0.0], 4, [False] * 4),
        ([0.5, 2.0, 1.0, 0.0], -1, [False] * 4),
        ([0.5, INF, 1.0, 0.0], 1, [False] * 4),
        ([0.5, 2.0, NAN, 0.0], 2, [False] * 4),
        ([0.5, 2.0, 1.0, -INF], 1, [False] * 4),  # as in the kernel, a row that is not finite is never in
    ],
)
def test_in_top_k_is_tensorflows(row: list[float], target: int, expected: list[bool]) -> None:
    """in_top_k agrees with TensorFlow for k = 1 to 4, and is False for k = 0."""
    predictions, targets = torch.tensor([row, [3.0, 0.0, 0.0, 0.0]]), torch.tensor([target, 0], dtype=torch.int32)
    for k, is_in in enumerate([False, *expected]):
        assert tensorflow.in_top_k(targets, predictions, k).tolist() == [is_in, k > 0]
        assert tensorflow.v1.in_top_k(predictions, targets, k).tolist() == [is_in, k > 0]


def test_in_top_k_of_nothing_is_nothing() -> None:
    """in_top_k of no rows is empty, and of no classes is False."""
    assert tensorflow.in_top_k(torch.zeros(0).long(), torch.zeros(0, 3), 1).shape == (0,)
    assert tensorflow.in_top_k(torch.zeros(2).long(), torch.zeros(2, 0), 1).tolist() == [False, False]


@pytest.mark.parametrize(
    "targets, predictions, k, field",
    [
        (torch.zeros(2).long(), torch.zeros(3, 4), 1, "targets"),
        (torch.full((3,), 0.5), torch.zeros(3, 4), 1, "targets"),
        (torch.zeros(3).long(), torch.zeros(3, 4).long(), 1, "predictions"),
        (torch.zeros(3).long(), torch.zeros(3), 1, "predictions"),
        (torch.zeros(3).long(), torch.zeros(3, 4), 1.5, "k"),
        ("abc", torch.zeros(3, 4), 1, "targets"),
        (torch.zeros(3).long(), None, 1, "predictions"),
    ],
)
def test_in_top_k_refuses_what_fits_no_predictions(targets: Tensor, predictions: Tensor, k: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        tensorflow.in_top_k(targets, predictions, k)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "draw, field",
    [
        (lambda: tensorflow.learned_unigram_candidate_sampler(LABELS, 2, 5, True, 10**15), "range_max"),
        (lambda: tensorflow.all_candidate_sampler(LABELS, 2, 10**15, True), "num_sampled"),
        (lambda: tensorflow.uniform_candidate_sampler(LABELS, 2, 10**15, False, 173), "num_sampled"),
    ],
    ids=["learned", "all", "uniform"],
)
def test_what_does_not_fit_in_memory_is_refused_by_name(draw: Callable[[], object], field: str) -> None:
    """A request for a petabyte of ids or counts raises LimitExceeded with the argument's name."""
    with pytest.raises(LimitExceeded) as refused:
        draw()
    assert refused.value.field == field
