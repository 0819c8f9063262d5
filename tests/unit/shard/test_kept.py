"""Values that a score keeps for its step: used while they are valid, limited in size, and freed with their part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from shardloss_server.numerics import kernel
from shardloss_server.numerics.exponentials import Exponentials
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.kernel import Block, Columns, SoftmaxSums
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.numerics.partial import Partial
from shardloss_server.numerics.transform import Transform
from shardloss_server.placement import Placement
from shardloss_server.shard.kept import Kept, Room
from shardloss_server.shard.record import (
    Batch,
    Candidates,
    Part,
    Record,
    RowCandidates,
    RowWrite,
    StepKey,
    TableSpec,
    Upstream,
)
from shardloss_server.shard.rows import MANY_ROWS, put_, taken
from shardloss_server.shard.table import ShardTable
from torch import Tensor

V, D, N = 211, 5, 7
EXACT = 1e-13
LARGE = 1 << 30


def table_of(max_bytes: int) -> tuple[ShardTable, Room]:
    """Return one float64 shard that may keep up to max_bytes, and its room."""
    room = Room(max_bytes)
    start = Initializer("normal", 0.7, 3)
    spec = TableSpec("t", V, D, "float64", True, Placement("mod", V, 1), start, OptimizerSpec("adagrad", eps=1e-3))
    table = ShardTable(spec, 0, 8, room)
    table.fill_()
    return table, room


def part_of(num_sampled: int, num_rows: int = N) -> Part:
    labels = torch.randint(0, V, (num_rows, 2))
    weights = torch.full((num_rows, 2), 0.5, dtype=torch.float64)
    batch = Batch(torch.randn(num_rows, D, dtype=torch.float64), labels, weights, weights.sum(1))
    if not num_sampled:
        return Part(batch, None)
    ids = torch.randperm(V)[:num_sampled].sort().values
    log_weight = torch.rand(num_sampled, dtype=torch.float64)
    removed = torch.full_like(log_weight, -torch.inf)
    return Part(batch, Candidates(ids, log_weight, removed, torch.rand(num_rows, 2, dtype=torch.float64)))


def own_part(num_sampled: int, num_rows: int = N, objective: Objective | None = None) -> Part:
    """Return a part in which each row has its own candidates.

    Many of them occur twice; every third is removed, and all of the first row's.
    """
    part = part_of(0, num_rows)
    ids = torch.randint(0, V, (num_rows, num_sampled))
    log_weight = torch.rand(num_rows, num_sampled, dtype=torch.float64)
    log_weight[:, ::3] = log_weight[0] = -torch.inf
    own = RowCandidates(ids, log_weight, torch.rand(num_rows, 2, dtype=torch.float64))
    return dataclasses.replace(part, candidates=own, objective=objective or Objective())


def commit(table: ShardTable, parts: list[Part], lse: list[Tensor]) -> None:
    upstreams = tuple(Upstream(one, torch.linspace(-1, 2, len(one), dtype=torch.float64)) for one in lse)
    table.apply_(Record(table.version + 1, StepKey("s", table.version + 1, b""), 0.3, 0, tuple(parts), upstreams))


@pytest.mark.parametrize("chunk_logits", [64 * N, 1 << 19], ids=["four chunks", "one"])
@pytest.mark.parametrize("num_sampled", [0, 40])
def test_steps_with_kept_exponentials_equal_steps_without(
    num_sampled: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, of one part and of several, agree to 1e-13 whether all exponentials are kept, none, or some."""
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", chunk_logits)
    steps = [[part_of(num_sampled)], [part_of(num_sampled), part_of(0, 3), part_of(25)], [part_of(num_sampled)]]
    ends = []
    for max_bytes in (LARGE, 0, 5000):
        table, _ = table_of(max_bytes)
        for parts in steps:
            commit(table, parts, [table.score(part, True, keep=True).statistics.lse for part in parts])
        ends.append((table.weights, table.biases, table.weight_state["sum"]))
    for end in ends[1:]:
        for mine, other in zip(ends[0], end, strict=True):
            torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)


OBJECTIVES = {
    "plain": Objective(),
    "logistic": Objective("logistic"),
    "capped and scaled": Objective(transform=Transform(scale=3.0, soft_cap=2.0)),
    "cosines": Objective(transform=Transform(normalize=True)),
}


@pytest.mark.parametrize("entry_elements", [3 * D, 1 << 24], ids=["in ranges", "at once"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_candidates_of_rows_own_step_alike_whatever_is_kept(
    kind: str, entry_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps agree for a part alone, with all candidates removed, with none given, and next to parts of other shapes."""
    monkeypatch.setattr(kernel, "ENTRY_ELEMENTS", entry_elements)
    own = [own_part(n, rows, OBJECTIVES[kind]) for n, rows in ((90, N), (1, 3), (0, 2), (11, 1))]
    steps = [own[:1], own, [own[0], part_of(40)], [part_of(0, 3), own[2]], own[2:3]]
    ends = []
    for max_bytes in (LARGE, 0, 5000):
        table, _ = table_of(max_bytes)
        for parts in steps:
            commit(table, parts, [table.score(part, True, keep=True).statistics.lse for part in parts])
        ends.append((table.weights, table.biases, table.weight_state["sum"]))
    for end in ends[1:]:
        for mine, other in zip(ends[0], end, strict=True):
            torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)
    assert torch.isfinite(ends[0][0]).all()


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("num_rows", [0, 3, MANY_ROWS + 5])
@pytest.mark.parametrize("dim", [5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_taken_and_put_as_they_are(dtype: torch.dtype, dim: int, num_rows: int, is_shifted: bool) -> None:
    """Rows of any value and alignment keep every bit except the sign of zero; other rows are unchanged."""
    values = torch.randn(2 * MANY_ROWS, dim).to(dtype)
    values[1], values[2], values[3] = torch.inf, -torch.inf, torch.nan
    index = torch.randperm(len(values))[:num_rows]
    found = taken(values, index)
    torch.testing.assert_close(found, values[index], rtol=0, atol=0, equal_nan=True)
    wanted, new = values.clone(), found + 1
    wanted[index] = new
    if is_shifted:
        new = torch.cat([new.new_zeros(1), new.flatten()])[1:].view(num_rows, dim)
    put_(values, index, new)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [part_of, own_part])
@pytest.mark.parametrize("num_sampled", [0, 40])
def test_what_was_kept_is_not_used_at_another_version(num_sampled: int, make: Callable[[int], Part]) -> None:
    """A part scored before another part's step, or before a write, is recomputed from the current rows."""
    first, second = make(num_sampled), make(num_sampled)
    ends = []
    for max_bytes in (LARGE, 0):
        table, _ = table_of(max_bytes)
        lse = table.score(first, True, keep=True).statistics.lse
        table.score(second, True, keep=True)
        commit(table, [first], [lse])
        rows = torch.linspace(0, 1, 3 * D, dtype=torch.float64).view(3, D)
        table.write_(RowWrite(2, torch.tensor([1, 2, 3]), rows, None))
        commit(table, [second], [table.score(second, False).statistics.lse])
        ends.append(table.weights)
    torch.testing.assert_close(ends[0], ends[1], rtol=EXACT, atol=EXACT)


def test_room_is_given_back_with_the_version_and_with_the_part() -> None:
    """A step frees what other parts kept, and deleting a part frees what was kept for it."""
    table, room = table_of(LARGE)
    part, other = part_of(0), part_of(40)
    lse = table.score(part, True, keep=True).statistics.lse
    table.score(other, True, keep=True)
    assert room.taken_bytes > 0
    commit(table, [part], [lse])
    assert room.taken_bytes == 0
    table.score(other, True, keep=True)
    assert room.taken_bytes > 0
    del other
    assert room.taken_bytes == 0


@pytest.mark.parametrize("kind", ["full", "unit vectors", "many labels", "own"])
def test_what_is_held_is_what_is_counted(kind: str) -> None:
    """All tensors that a shard keeps, including rows of labels and unit vectors, are counted and fit its room."""
    max_bytes = 20_000
    table, room = table_of(max_bytes)
    parts = [part_of(0 if kind != "many labels" else 40, num_rows=3) for _ in range(9)]
    if kind == "own":
        parts = [own_part(40, num_rows=3) for _ in range(50)]
    if kind == "unit vectors":
        unit = Objective(transform=Transform(normalize=True))
        parts = [dataclasses.replace(part, objective=unit) for part in parts]
    for part in parts:
        table.score(part, True, keep=True)
    held = [table.kept.of(part) for part in parts]
    tensors = [b.exponentials.values for one in held for b in one.blocks.values()]
    tensors += [b.rows for one in held for b in one.blocks.values() if b.rows is not None]
    tensors += [x for one in held if one.entries for x in (one.entries.row_index, one.entries.columns.logits)]
    labels = [one.labels for one in held if one.labels is not None]
    tensors += [x for one in labels for x in (one.rows, one.row_index, one.batch_row, one.biases, one.weight)]
    assert tensors
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) <= room.taken_bytes <= max_bytes


def test_lent_memory_counts_as_room() -> None:
    """After steps over all classes and sampled steps of every size, taken and spare memory are within the budget."""
    max_bytes = 60_000
    table, room = table_of(max_bytes)
    for num_sampled in (0, 0, 7, 30, 90, 150, 0, 210):
        part = part_of(num_sampled)
        commit(table, [part], [table.score(part, True, keep=True).statistics.lse])
        assert room.taken_bytes + room.spare_bytes <= max_bytes
    room.take(1, max_bytes)
    assert room.spare_bytes == 0


def test_a_score_that_no_step_follows_keeps_nothing() -> None:
    """A score keeps values for a step only if `keep` is set."""
    table, room = table_of(LARGE)
    table.score(part_of(0), True)
    assert room.taken_bytes == 0


def test_shards_of_a_worker_share_their_room() -> None:
    """Bytes that one shard takes are unavailable to the others until it frees them."""
    room = Room(1000)
    block = Block(torch.zeros(3, D), torch.zeros(3), None, None, None)
    exponentials = Exponentials(torch.zeros(N, 11), torch.zeros(N))  # 4 * (77 + 7) bytes
    parts = [part_of(0) for _ in range(4)]
    kept = [Kept(room).begin(part) for part in parts]
    for one in kept:
        one.keep(0, block, exponentials)
    assert [len(one.blocks) for one in kept] == [1, 1, 0, 0]
    kept[0].free()
    kept[0].free()
    kept[2].keep(0, block, exponentials)
    assert len(kept[2].blocks) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_those_of_the_logits(dtype: torch.dtype) -> None:
    """exp(z - max z) is right to 4 units in the last place if it is above 1e-3; a row of -inf has zeros."""
    logits = torch.randn(N, 333, dtype=dtype) * 8
    logits[2] = -torch.inf
    logits[3, 5:] = -torch.inf
    top = logits.amax(1, keepdim=True).double()
    wanted = torch.exp(logits.double() - torch.where(torch.isneginf(top), 0.0, top))
    sums = SoftmaxSums(Partial.empty(N, D, dtype), dtype)
    found = sums.add_(Columns(logits.clone(), None, None), torch.zeros(333, D, dtype=dtype))
    assert found is not None
    error = (found.values.double() - wanted).abs() / torch.where(wanted == 0, 1.0, wanted)
    counts = wanted > 1e-3
    assert error[counts].max() <= 8 * torch.finfo(dtype).eps
    assert not found.values[2].any()
    assert found.top[2] == 0
