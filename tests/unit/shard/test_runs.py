"""Scores merge along one fixed tree over the shards, so the place where they are merged changes no bit."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.frontend.finish import merge
from shardloss_server.numerics.partial import Partial, Spread, Statistics, Sums, Target
from shardloss_server.shard.record import Score
from shardloss_server.shard.runs import merge_runs
from torch import Tensor

N, D = 7, 5
MOST = 9  # shards: past a power of two, so that the tree is clipped
CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=MOST).filter(lambda sizes: sum(sizes) <= MOST)


def score_of(shard: int, family: str = "softmax", version: int = 3) -> Score:
    """Return a score of one shard, in float32 as in most tables, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(shard)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kind: type[Statistics] = Sums if family == "logistic" else Partial
    statistics = kind(3 * drawn(N).double(), drawn(N, D), drawn(N).double())
    at = torch.nonzero(drawn(N) > 0)[:, 0]
    target = Target(drawn(N).double(), drawn(len(at), D), drawn(N).double(), at)
    spread = Spread(drawn(D).double(), drawn().double())
    return Score(statistics, target, spread, version, range(shard, shard + 1))


def leaves(score: Score) -> list[Tensor]:
    """Return every tensor of a score."""
    parts = (score.statistics, score.target, score.spread)
    return [getattr(part, name) for part in parts for name in part.__slots__]


def by_hand(scores: list[Score], first: int, end: int, size: int) -> Score:
    """Return the node of the tree over [first, end) by its definition: halves of a power of two, from the root down."""
    if end - first == 1:
        return scores[first]
    half = size // 2
    if first + half >= end:
        return by_hand(scores, first, end, half)
    left, right = by_hand(scores, first, first + half, half), by_hand(scores, first + half, end, half)
    (both,) = merge_runs([left, right], end)
    return both


@pytest.mark.parametrize("family", ["softmax", "logistic"])
@given(CUTS)
def test_merging_each_nodes_runs_first_changes_no_bit(family: str, sizes: list[int]) -> None:
    """For any split of the shards over nodes, merging on each node first gives the bits of merging all at once."""
    num_shards = sum(sizes)
    scores = [score_of(shard, family) for shard in range(num_shards)]
    (whole,) = merge_runs(scores, num_shards)
    bounds = [0, *accumulate(sizes)]
    met = [run for first, end in pairwise(bounds) for run in merge_runs(scores[first:end], num_shards)]
    (again,) = merge_runs(reversed(met), num_shards)
    expected = by_hand(scores, 0, num_shards, 16)
    assert whole.shards == again.shards == range(num_shards)
    for one, other, third in zip(leaves(whole), leaves(again), leaves(expected), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    assert torch.equal(merge(met).statistics.lse, merge(scores).statistics.lse)


@pytest.mark.parametrize(
    ("first", "end", "num_shards", "expected"),
    [
        (0, 4, 8, [range(4)]),
        (2, 6, 8, [range(2, 4), range(4, 6)]),  # halves of different nodes
        (1, 4, 8, [range(1, 2), range(2, 4)]),
        (4, 7, 7, [range(4, 7)]),  # the right half is clipped
        (4, 7, 8, [range(4, 6), range(6, 7)]),  # here the right half is incomplete
        (5, 6, 6, [range(5, 6)]),
        (0, 5, 5, [range(5)]),
    ],
)
def test_only_halves_of_one_node_merge(first: int, end: int, num_shards: int, expected: list[range]) -> None:
    """Runs that are not aligned stay separate, in shard order."""
    runs = merge_runs([score_of(shard) for shard in range(first, end)], num_shards)
    assert [run.shards for run in runs] == expected


def test_scores_of_two_versions_stay_apart() -> None:
    """Scores of different versions are not merged, so that the owner sees that they differ."""
    runs = merge_runs([score_of(0), score_of(1), score_of(2, version=4), score_of(3)], 4)
    assert [(run.shards, run.version) for run in runs] == [(range(2), 3), (range(2, 3), 4), (range(3, 4), 3)]


def test_a_score_without_spread_and_rows_merges_without() -> None:
    """A value that one side lacks is absent from the merged score."""
    bare = Score(Partial(torch.zeros(N).double(), None), Target(torch.zeros(N).double(), None), None, 3, range(1, 2))
    (whole,) = merge_runs([score_of(0), bare], 2)
    assert whole.spread is None
    assert whole.target.target_row is None
    assert isinstance(whole.statistics, Partial)
    assert whole.statistics.mean_row is None
