"""Candidate draws are pure functions of (sampler, seed, step), with TensorFlow's expected counts; repeats fold."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from shardloss import sampling
from shardloss.errors import InvalidArgument
from shardloss.sampling import draws
from shardloss_server.frontend.counts import ClassCounts
from shardloss_server.frontend.plan import draw_with_tries
from shardloss_server.frontend.request import SamplerSpec
from shardloss_server.numerics.correction import find_hits, fold_repeats
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
OPS = {
    "tf.random.log_uniform_candidate_sampler": "log_uniform",
    "tf.random.uniform_candidate_sampler": "uniform",
}
KINDS = tuple(OPS.values())
KEYS = [(0, 0), (0, 1), (1, 0), (7, 123_456), (2**63, 2**40)]


def probability(kind: str, num_classes: int) -> NDArray[np.float64]:
    """Return the documented probability of each class."""
    if kind == "uniform":
        return np.full(num_classes, 1 / num_classes)
    return np.array([math.log((k + 2) / (k + 1)) / math.log(num_classes + 1) for k in range(num_classes)])


def draw(kind: str, num_classes: int, num_sampled: int, unique: bool, seed: int = 0, step: int = 0) -> sampling.Draw:
    return sampling.draw(sampling.DISTRIBUTIONS[kind](num_classes), num_sampled, unique, seed, step)


# Expected counts against TensorFlow


def golden_cases() -> list[dict[str, Any]]:
    """Return the golden cases of the samplers that the service has, by family and op."""
    index = json.loads((GOLDEN / "index.json").read_text())
    return [case for case in index if case["family"] == "tf_candidate_sampler" and case["op"] in OPS]


def rows_of(case: dict[str, Any]) -> list[tuple[NDArray[np.int64], NDArray[np.float64], int]]:
    """Return (sampled, expected count of every class, num_tries) of each recorded call.

    With repeats num_tries is num_sampled. For a distinct draw TensorFlow does not report it: it is the integer that
    explains the count of the rarest class. If the first S draws were distinct, the counts are Q = p * S.
    """
    arrays = np.load(GOLDEN / case["file"], allow_pickle=False)
    p = probability(OPS[case["op"]], case["range_max"])
    rows = []
    for sampled, count in zip(arrays["sampled"], arrays["true_expected_count"].astype(np.float64), strict=True):
        num_tries = case["num_sampled"]
        if case["unique"] and not np.allclose(count, p * num_tries, rtol=1e-6):
            tries = math.log1p(-count[-1]) / math.log1p(-p[-1])
            num_tries = round(tries)
            assert tries == pytest.approx(num_tries, rel=1e-4)
        rows.append((sampled, count, num_tries))
    return rows


golden = pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["case"])


def test_the_golden_index_has_both_samplers_with_and_without_repeats() -> None:
    """The golden index covers both samplers with and without repeats, so the comparison below is not empty."""
    found = {(OPS[case["op"]], case["unique"]) for case in golden_cases()}
    assert found == {(kind, unique) for kind in KINDS for unique in (False, True)}


@golden
def test_expected_counts_equal_tensorflows(case: dict[str, Any]) -> None:
    """Q of every class equals TensorFlow's to float32 if repeats are allowed or a distinct draw met a repeat."""
    distribution = sampling.DISTRIBUTIONS[OPS[case["op"]]](case["range_max"])
    class_ids = np.arange(case["range_max"])
    compared = 0
    for _, count, num_tries in rows_of(case):
        if case["unique"] and num_tries == case["num_sampled"]:
            continue  # covered by the next test
        ours = sampling.expected_count(distribution, class_ids, case["num_sampled"], case["unique"], num_tries)
        np.testing.assert_allclose(ours, count, rtol=1e-6)
        compared += 1
    assert compared


def test_a_distinct_draw_without_a_repeat_counts_as_with_repeats() -> None:
    """If the first S draws are distinct, Q is p * S as in TensorFlow, not 1 - (1 - p)^S."""
    lucky = [
        (case, count)
        for case in golden_cases()
        for _, count, num_tries in rows_of(case)
        if case["unique"] and num_tries == case["num_sampled"]
    ]
    assert lucky
    for case, count in lucky:
        distribution = sampling.DISTRIBUTIONS[OPS[case["op"]]](case["range_max"])
        num_sampled = case["num_sampled"]
        ours = sampling.expected_count(distribution, np.arange(case["range_max"]), num_sampled, True, num_sampled)
        np.testing.assert_allclose(ours, count, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_documented_ones(kind: str) -> None:
    """p sums to 1 and is 1/V, or log((k + 2) / (k + 1)) / log(V + 1)."""
    ids = np.arange(173)
    p = sampling.DISTRIBUTIONS[kind](173).probability(ids)
    np.testing.assert_allclose(p, probability(kind, 173), rtol=1e-13)
    assert p.sum() == pytest.approx(1.0, rel=1e-12)


# Draws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_the_same_key_gives_the_same_candidates(kind: str, unique: bool, key: tuple[int, int]) -> None:
    """A draw is a function of (seed, step): it is repeated exactly, even with other draws in between."""
    first = draw(kind, 173, 31, unique, *key)
    np.random.default_rng().random()
    draw(kind, 173, 29, not unique, *key)
    again = draw(kind, 173, 31, unique, *key)
    assert first.sampled.tolist() == again.sampled.tolist()
    assert first.num_tries == again.num_tries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unique", [False, True])
def test_another_seed_or_step_gives_other_candidates(kind: str, unique: bool) -> None:
    """Each (seed, step) has its own candidates; seed and step are not interchangeable: (0, 1) and (1, 0) differ."""
    draws = {tuple(draw(kind, 1009, 31, unique, *key).sampled) for key in KEYS}
    assert len(draws) == len(KEYS)


@given(st.sampled_from(KINDS), st.integers(1, 60), st.data(), st.integers(0, 2**63), st.integers(0, 2**40))
def test_a_distinct_draw_has_no_repeats(kind: str, num_classes: int, data: st.DataObject, seed: int, step: int) -> None:
    """The S ids of a distinct draw are in [0, V) and all different, up to S = V."""
    num_sampled = data.draw(st.integers(1, min(num_classes, 40)))
    drawn = draw(kind, num_classes, num_sampled, True, seed, step)
    assert len(drawn.sampled) == len(set(drawn.sampled.tolist())) == num_sampled
    assert drawn.sampled.min() >= 0
    assert drawn.sampled.max() < num_classes
    assert drawn.num_tries >= num_sampled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [1, 2, 40])
def test_a_full_distinct_draw_is_a_permutation(kind: str, num_classes: int) -> None:
    """num_sampled = V gives every class once."""
    assert sorted(draw(kind, num_classes, num_classes, True, 5).sampled) == list(range(num_classes))


@given(st.sampled_from(KINDS), st.integers(2, 60), st.integers(1, 30), st.integers(0, 2**40))
def test_num_tries_is_where_the_last_new_id_came(kind: str, num_classes: int, num_sampled: int, step: int) -> None:
    """A distinct draw is the first S different ids of the draw with repeats; num_tries counts up to the S-th."""
    num_sampled = min(num_sampled, num_classes // 2 + 1)
    drawn = draw(kind, num_classes, num_sampled, True, 11, step)
    stream = draw(kind, num_classes, drawn.num_tries, False, 11, step).sampled.tolist()
    assert list(dict.fromkeys(stream)) == drawn.sampled.tolist()
    assert len(set(stream[:-1])) == num_sampled - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unique", [False, True])
def test_huge_tables_are_drawn_from_at_no_cost(kind: str, unique: bool) -> None:
    """With V = 2^40 no array of size V is created, and ids are in range and exceed 32 bits."""
    drawn = draw(kind, 2**40, 4096, unique, 3)
    assert drawn.sampled.min() >= 0
    assert 2**32 < drawn.sampled.max() < 2**40
    assert drawn.sampled.dtype == np.int64


class Ends(np.random.Generator):
    """A generator that returns the smallest and the largest possible number."""

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return np.array([0.0, np.nextafter(1.0, 0.0)])


def test_the_uniform_bits_reach_both_ends() -> None:
    """u = 0 is class 0, and the largest u below 1 is class V - 1, never V."""
    for kind in KINDS:
        for num_classes in (1, 2, 3, 173, 2**31 + 1, 2**40):
            ids = sampling.DISTRIBUTIONS[kind](num_classes).draw(Ends(np.random.Philox()), 2)
            assert ids.tolist() == [0, num_classes - 1]


@pytest.mark.parametrize(
    "kind, num_classes, unique, key, sampled, num_tries",
    [
        ("log_uniform", 173, False, (0, 0), [0, 2, 0, 17, 12, 3, 131, 160, 2, 1, 38], 11),
        ("log_uniform", 173, True, (7, 123_456), [1, 8, 41, 90, 3, 11, 6, 33, 4, 13, 66], 14),
        ("log_uniform", 1_000_003, True, (2**63, 2**40), [277, 210, 2412, 1, 13, 4, 3387], 7),
        ("log_uniform", 13, True, (5, 3), [6, 1, 5, 12, 0, 3, 2, 7, 10, 8, 11], 30),
        ("uniform", 173, False, (0, 0), [1, 41, 19, 97, 86, 48, 163, 170, 43, 33, 123], 11),
        ("uniform", 173, True, (7, 123_456), [28, 77, 125, 151, 34, 49, 84, 66, 118, 48, 54], 11),
        ("uniform", 1_000_003, True, (2**63, 2**40), [407421, 387484, 563777, 62187, 191483, 119117, 588345], 7),
        ("uniform", 13, True, (5, 3), [9, 5, 12, 8, 0, 4, 2, 7, 3, 6, 10], 15),
    ],
)
def test_draws_are_those_of_the_first_release(
    kind: str, num_classes: int, unique: bool, key: tuple[int, int], sampled: list[int], num_tries: int
) -> None:
    """The bits of a (seed, step) never change, so a run that continues after an upgrade draws the same candidates."""
    drawn = draw(kind, num_classes, len(sampled), unique, *key)
    assert (drawn.sampled.tolist(), drawn.num_tries) == (sampled, num_tries)


def test_a_hopeless_distinct_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing all of 50,000 log-uniform classes would take millions of tries; it is refused and the field is named."""
    monkeypatch.setattr(draws, "MAX_TRIES", 1 << 17)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="num_sampled = 50000") as refused:
        draw_with_tries(SamplerSpec("log_uniform", 50_000, True, 0), 50_000, 0, labels, ClassCounts(50_000, False))
    assert refused.value.field == "sampler.num_sampled"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unique", [False, True])
def test_true_and_sampled_counts_come_from_one_draw(kind: str, unique: bool) -> None:
    """An id has the same Q as a label and as a candidate, and padding has a Q > 0, whose log is finite."""
    labels = torch.arange(-1, 41)[:, None].repeat(1, 2)
    values, num_tries = draw_with_tries(SamplerSpec(kind, 12, unique, 9), 41, 4, labels, ClassCounts(41, False))
    assert torch.equal(values.sampled_expected_count, values.true_expected_count[values.sampled + 1, 0])
    p = probability(kind, 41)
    expected = -np.expm1(num_tries * np.log1p(-p)) if unique and num_tries > 12 else p * 12
    np.testing.assert_allclose(values.true_expected_count[1:, 1].numpy(), expected, rtol=1e-12)
    assert (values.true_expected_count > 0).all()


# Folding repeats, finding hits


def naive_log_weight(sampled: list[int], log_q: list[float], class_id: int, removed: set[int]) -> float:
    """Return the log of the sum of 1/Q over the copies of an id that are not removed."""
    kept = [
        -q for place, (c, q) in enumerate(zip(sampled, log_q, strict=True)) if c == class_id and place not in removed
    ]
    return float(np.logaddexp.reduce(kept)) if kept else -math.inf


@given(
    st.lists(st.tuples(st.integers(0, 12), st.floats(-30, 3)), max_size=30),
    st.sampled_from(["none", "every", "last"]),
)
def test_folding_repeats_equals_keeping_all_columns(columns: list[tuple[int, float]], hit_removal: str) -> None:
    """logsumexp of z - log Q over an id's columns is z + log_weight; hit removal removes every copy or the last one."""
    sampled, log_q = [c for c, _ in columns], [q for _, q in columns]
    folded = fold_repeats(
        torch.tensor(sampled, dtype=torch.int64), torch.tensor(log_q, dtype=torch.float64), hit_removal
    )
    assert folded.class_ids.tolist() == sorted(set(sampled))
    expected = [naive_log_weight(sampled, log_q, c, set()) for c in sorted(set(sampled))]
    np.testing.assert_allclose(folded.log_weight.numpy(), expected, rtol=1e-13, atol=1e-13)
    if hit_removal == "none":
        assert folded.log_weight_after_hit is None
        return
    last = {c: place for place, c in enumerate(sampled)}
    removed = set(last.values()) if hit_removal == "last" else set(range(len(sampled)))
    after = [naive_log_weight(sampled, log_q, c, removed) for c in sorted(set(sampled))]
    assert folded.log_weight_after_hit is not None
    np.testing.assert_allclose(folded.log_weight_after_hit.numpy(), after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unique", [False, True])
def test_no_draws_are_no_candidates(unique: bool) -> None:
    """A draw with S = 0 makes no tries and returns no ids; S < 0 raises InvalidArgument."""
    drawn = sampling.draw(sampling.uniform(7), 0, unique, 3, 0)
    assert (drawn.sampled.tolist(), drawn.num_tries) == ([], 0)
    with pytest.raises(InvalidArgument) as refused:
        sampling.draw(sampling.uniform(7), -1, unique, 3, 0)
    assert refused.value.field == "num_sampled"


@pytest.mark.parametrize("number", [-1, 1 << 64, 1.5, np.int64(-1), None])
@pytest.mark.parametrize("field", ["seed", "step"])
def test_a_key_is_two_numbers_of_64_bits(field: str, number: int) -> None:
    """A seed or step that is not an integer in [0, 2^64) is refused; any integer type in range is accepted."""
    key = {"seed": 1, "step": 1, field: number}
    asks = (
        lambda: sampling.draw(sampling.uniform(7), 3, True, **key),
        lambda: sampling.partial_fc(np.array([2]), 7, 3, **key),
    )
    for ask in asks:
        with pytest.raises(InvalidArgument) as refused:
            ask()
        assert refused.value.field == field
    most = [sampling.draw(sampling.uniform(1 << 40), 3, True, of(2**63), 0) for of in (int, np.uint64)]
    assert most[0].sampled.tolist() == most[1].sampled.tolist()


@given(st.sets(st.integers(0, 20)), st.lists(st.lists(st.integers(-1, 20), min_size=3, max_size=3), max_size=7))
def test_hits_are_the_pairs_of_row_and_candidate(candidates: set[int], labels: list[list[int]]) -> None:
    """A hit is (n, c) if candidate c is a label of row n: once even if the label is repeated, and never for padding.

    Otherwise T copies of a label and S of a candidate, a few kilobytes, would produce N T S pairs.
    """
    class_ids = sorted(candidates)
    rows, places = find_hits(
        torch.tensor(class_ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64).reshape(-1, 3)
    )
    expected = [(n, class_ids.index(y)) for n, row in enumerate(labels) for y in set(row) if y in candidates]
    assert sorted(zip(rows.tolist(), places.tolist(), strict=True)) == sorted(expected)


def test_hits_equal_tensorflows() -> None:
    """The golden case of tf.nn.compute_accidental_hits gives the same pairs of row and sampled id."""
    arrays = np.load(GOLDEN / "tf_compute_accidental_hits.npz", allow_pickle=False)
    sampled = torch.from_numpy(arrays["sampled"])
    class_ids: Tensor = torch.unique(sampled)
    rows, places = find_hits(class_ids, torch.from_numpy(arrays["labels"]))
    ours = {(n, int(class_ids[c])) for n, c in zip(rows.tolist(), places.tolist(), strict=True)}
    assert ours == {(int(n), int(sampled[c])) for n, c in zip(arrays["row"], arrays["column"], strict=True)}


@pytest.mark.parametrize("kind, is_held", [("uniform", False), ("fixed_unigram", False), ("learned_unigram", True)])
def test_only_a_draw_by_learned_counts_keeps_commits_waiting(kind: str, is_held: bool) -> None:
    """Draws by other samplers need no lock, because the probabilities they use never change."""
    counts = ClassCounts(41, True)
    counts.write(0, np.ones(41))
    learning = threading.Thread(target=counts.learn, args=(np.array([3]),))
    with counts.unchanging(SamplerSpec(kind, 12, True, 9)):
        learning.start()
        learning.join(0.2 if is_held else 10.0)
        assert learning.is_alive() == is_held
    learning.join(10.0)
    assert not learning.is_alive()
