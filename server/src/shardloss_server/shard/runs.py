"""Merging of neighbouring shards' scores along one binary tree, so that the bits do not depend on where they merge.

The tree covers the shards [0, K): a node of level j is the run [i 2^j, (i + 1) 2^j), clipped at K, and merges its two
halves. Any process of the cluster that has both halves may merge them.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardloss_server.numerics.partial import add_spreads, add_targets, combine
from shardloss_server.shard.record import Score


def are_halves(left: range, right: range, num_shards: int) -> bool:
    """Return True if two runs are the halves of one node of the tree."""
    size = len(left)  # a left half is never clipped, since a right half follows it
    is_left = size & (size - 1) == 0 and left.start % (2 * size) == 0
    return is_left and right == range(left.stop, min(left.stop + size, num_shards))


def combine_scores(a: Score, b: Score) -> Score:
    """Merge the scores of two neighbouring runs at one version."""
    return Score(
        combine(a.statistics, b.statistics),
        add_targets(a.target, b.target),
        add_spreads(a.spread, b.spread),
        a.version,
        range(a.shards.start, b.shards.stop),
    )


def merge_runs(scores: Iterable[Score], num_shards: int) -> list[Score]:
    """Merge the scores whose sibling halves are present at the same version; return all scores in shard order."""
    merged: list[Score] = []
    for score in sorted(scores, key=lambda score: score.shards.start):
        merged.append(score)
        while len(merged) > 1 and can_merge(merged[-2], merged[-1], num_shards):
            right = merged.pop()
            merged.append(combine_scores(merged.pop(), right))
    return merged


def can_merge(left: Score, right: Score, num_shards: int) -> bool:
    """Return True if two scores are the halves of one node of the tree, at the same version."""
    return left.version == right.version and are_halves(left.shards, right.shards, num_shards)
