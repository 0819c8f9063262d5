"""Every class is stored in exactly one row of exactly one shard, for both strategies and any V and K."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.placement import Placement, hosted_shards, num_hosts

STRATEGIES = ("div", "mod")
placements = st.builds(
    Placement,
    st.sampled_from(STRATEGIES),
    st.integers(1, 300),  # V on both sides of K: even, uneven and empty shards
    st.integers(1, 40),
)


def naive_owner(placement: Placement, class_id: int) -> tuple[int, int]:
    """Return the (shard, row) of a class by walking over the classes, as tf.nn.embedding_lookup documents them."""
    num_classes, num_shards = placement.num_classes, placement.num_shards
    if placement.strategy == "mod":
        return class_id % num_shards, class_id // num_shards
    sizes = [num_classes // num_shards + (k < num_classes % num_shards) for k in range(num_shards)]
    for shard, size in enumerate(sizes):
        if class_id < size:
            return shard, class_id
        class_id -= size
    raise AssertionError("the sizes sum to V")


@given(placements)
def test_shards_partition_the_classes(placement: Placement) -> None:
    """The class ids of all shards together are 0, ..., V - 1, each once, and ascend within a shard."""
    shards = [placement.class_ids(k, 0, placement.num_rows(k)) for k in range(placement.num_shards)]
    assert sorted(torch.cat(shards).tolist()) == list(range(placement.num_classes))
    assert all((ids.diff() > 0).all() for ids in shards)


@given(placements)
def test_class_and_row_are_inverse(placement: Placement) -> None:
    """class id -> (shard, row) -> class id is the identity and agrees with TensorFlow's strategies."""
    class_ids = torch.arange(placement.num_classes)
    shards = placement.shard_of(class_ids)
    for shard in range(placement.num_shards):
        mine = class_ids[shards == shard]
        rows = placement.rows(shard, mine)
        assert [(shard, int(row)) for row in rows] == [naive_owner(placement, int(c)) for c in mine]
        assert torch.equal(placement.class_ids(shard, 0, placement.num_rows(shard))[rows], mine)


@given(placements, st.data())
def test_a_range_of_rows_is_that_part_of_the_shard(placement: Placement, data: st.DataObject) -> None:
    """class_ids of rows [a, b) are the classes stored in these rows, also for an empty range."""
    shard = data.draw(st.integers(0, placement.num_shards - 1))
    end = data.draw(st.integers(0, placement.num_rows(shard)))
    start = data.draw(st.integers(0, end))
    every = placement.class_ids(shard, 0, placement.num_rows(shard))
    assert torch.equal(placement.class_ids(shard, start, end), every[start:end])


@given(placements)
def test_each_class_has_one_owner_and_padding_none(placement: Placement) -> None:
    """`owned` is true for exactly one shard, the one from `shard_of`, and for no shard on padding (negative)."""
    class_ids = torch.arange(placement.num_classes)
    ids = torch.cat([torch.tensor([-1, -placement.num_shards, -(2**62)]), class_ids])
    owners = torch.stack([placement.owned(k, ids) for k in range(placement.num_shards)])
    assert not owners[:, :3].any()
    assert (owners[:, 3:].sum(0) == 1).all()
    assert torch.equal(owners[:, 3:].int().argmax(0), placement.shard_of(class_ids))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_shards_than_classes_leaves_empty_shards(strategy: str) -> None:
    """3 classes over 7 shards put one row in each of the first three shards and none in the others."""
    placement = Placement(strategy, 3, 7)
    assert [placement.num_rows(k) for k in range(7)] == [1, 1, 1, 0, 0, 0, 0]
    assert [placement.class_ids(k, 0, placement.num_rows(k)).tolist() for k in range(7)] == [[0], [1], [2], *[[]] * 4]


def test_div_gives_the_first_shards_the_longer_ranges() -> None:
    """11 classes over 3 shards with "div" form contiguous ranges of 4, 4 and 3."""
    placement = Placement("div", 11, 3)
    shards = [placement.class_ids(k, 0, placement.num_rows(k)).tolist() for k in range(3)]
    assert shards == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_mod_deals_classes_like_cards() -> None:
    """11 classes over 3 shards with "mod" are assigned to shard id % 3."""
    placement = Placement("mod", 11, 3)
    shards = [placement.class_ids(k, 0, placement.num_rows(k)).tolist() for k in range(3)]
    assert shards == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


@given(
    st.sampled_from(STRATEGIES),
    st.integers(2**31 + 1, 2**40),
    st.integers(1, 4096),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=7),
)
def test_ids_above_32_bits_keep_their_place(
    strategy: str, num_classes: int, num_shards: int, where: list[float]
) -> None:
    """With V above 2^31 every id still maps to one row and back, including the first and last of the table."""
    placement = Placement(strategy, num_classes, num_shards)
    ids = torch.tensor([0, 2**31 - 1, 2**31, num_classes - 1, *(int(u * num_classes) for u in where)])
    for class_id, shard in zip(ids, placement.shard_of(ids).tolist(), strict=True):
        row = int(placement.rows(shard, class_id))
        assert (shard, row) == naive_owner(placement, int(class_id))
        assert 0 <= row < placement.num_rows(shard)
        assert placement.class_ids(shard, row, row + 1).tolist() == [int(class_id)]
        assert placement.owned(shard, class_id)
    assert sum(placement.num_rows(k) for k in range(num_shards)) == num_classes


@given(st.integers(1, 40), st.integers(1, 12))
def test_neighbouring_shards_fall_to_neighbouring_workers(num_shards: int, num_workers: int) -> None:
    """Shards are assigned in order; only the first workers have any, in numbers that differ by at most one."""
    hosted = [hosted_shards(worker, num_workers, num_shards) for worker in range(num_workers)]
    assert [shard for shards in hosted for shard in shards] == list(range(num_shards))
    sizes = [len(shards) for shards in hosted if shards]
    assert max(sizes) - min(sizes) <= 1
    assert [bool(shards) for shards in hosted] == [
        worker < num_hosts(num_workers, num_shards) for worker in range(num_workers)
    ]
