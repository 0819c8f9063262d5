"""The ledger answers repeats of applied steps and never lets a step of a session be applied twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.ledger import Ledger, Outcome
from shardloss_server.shard.record import Batch, Part, Record, RowWrite, StepKey, TableSpec, Upstream
from shardloss_server.shard.table import ShardTable, VersionGap


def note(ledger: Ledger, session: str, step: int, version: int, digest: bytes = b"payload") -> Outcome:
    outcome = Outcome(digest, version, 0)
    ledger.note(StepKey(session, step, digest), outcome)
    return outcome


def test_a_new_ledger_knows_nothing() -> None:
    """A new ledger has no session and no outcome, and its highest step is 0."""
    ledger = Ledger(3)
    assert not ledger.knows("a")
    assert ledger.highest("a") == 0
    assert ledger.outcome("a", 1) is None


def test_an_applied_step_is_answered_with_its_outcome() -> None:
    """A repeat gets the step's digest, version and staleness; other sessions and steps have no outcome."""
    ledger = Ledger(3)
    ledger.note(StepKey("a", 4, b"x"), Outcome(b"x", 9, 2))
    assert ledger.outcome("a", 4) == Outcome(b"x", 9, 2)
    assert ledger.outcome("a", 3) is None
    assert ledger.outcome("b", 4) is None
    assert ledger.knows("a")
    assert ledger.highest("a") == 4


def test_sessions_do_not_share_steps() -> None:
    """The same step number in two sessions is two steps."""
    ledger = Ledger(3)
    first, second = note(ledger, "a", 5, 1), note(ledger, "b", 5, 2)
    assert ledger.outcome("a", 5) == first
    assert ledger.outcome("b", 5) == second


@pytest.mark.parametrize("step", [1, 4, 5])
def test_steps_only_grow(step: int) -> None:
    """Recording a step that is not above the highest one is an internal error and changes nothing."""
    ledger = Ledger(3)
    kept = note(ledger, "a", 5, 1)
    with pytest.raises(ValueError, match="not above 5"):
        note(ledger, "a", step, 2, b"other")
    assert ledger.highest("a") == 5
    assert ledger.outcome("a", 5) == kept


def test_gaps_between_steps_are_legal() -> None:
    """Aborted steps leave gaps, so 1, 7, 1000 is a legal sequence."""
    ledger = Ledger(3)
    for version, step in enumerate((1, 7, 1000), 1):
        note(ledger, "a", step, version)
    assert ledger.highest("a") == 1000
    assert ledger.outcome("a", 8) is None


def test_only_the_last_outcomes_are_kept() -> None:
    """Recent steps can be repeated and old ones cannot; forgetting outcomes does not lower the highest step."""
    ledger = Ledger(3)
    for step in range(1, 101):
        note(ledger, "a", step, step)
    kept = [step for step in range(1, 101) if ledger.outcome("a", step) is not None]
    assert kept == list(range(kept[0], 101))
    assert 1 < kept[0] <= 100
    assert ledger.highest("a") == 100


def test_the_session_that_committed_longest_ago_is_forgotten_first() -> None:
    """At most max_sessions are remembered; a commit makes its session the most recent one."""
    ledger = Ledger(3)
    for version, (session, step) in enumerate([("a", 1), ("b", 1), ("c", 1), ("a", 2), ("d", 1)], 1):
        note(ledger, session, step, version)
    assert [session for session in "abcd" if ledger.knows(session)] == ["a", "c", "d"]
    assert ledger.highest("b") == 0
    assert ledger.outcome("b", 1) is None
    assert ledger.outcome("a", 1) is not None


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 5)), max_size=60))
def test_the_ledger_is_a_log_of_the_last_sessions(max_sessions: int, commits: list[tuple[str, int]]) -> None:
    """Compared with a plain list of all commits, the remembered sessions are the last max_sessions distinct ones."""
    ledger, log = Ledger(max_sessions), list[tuple[str, int]]()
    for version, (session, growth) in enumerate(commits, 1):
        step = ledger.highest(session) + growth
        note(ledger, session, step, version)
        log.append((session, step))
        remembered = list(dict.fromkeys(s for s, _ in reversed(log)))[:max_sessions]
        assert [s for s in "abcdefg" if ledger.knows(s)] == sorted(remembered)
        for known in remembered:
            assert ledger.highest(known) == max(step for s, step in reversed(log) if s == known)
        log = [entry for entry in log if entry[0] in remembered]  # a forgotten session starts from scratch


# A shard applies only the next version, and each version once


def shard_table() -> ShardTable:
    spec = TableSpec(
        "table", 11, 5, "float64", True, Placement("div", 11, 1), Initializer("normal", 1.0, 3), OptimizerSpec("sgd")
    )
    table = ShardTable(spec, 0, 8)
    table.fill_()
    return table


def record(version: int, step: int) -> Record:
    labels, ones = torch.tensor([[3], [7]]), torch.ones(2, 1, dtype=torch.float64)
    batch = Batch(torch.ones(2, 5, dtype=torch.float64), labels, ones, ones[:, 0])
    upstream = Upstream(torch.full((2,), 4.0).double(), torch.ones(2).double())
    return Record(version, StepKey("a", step, b"x"), 0.1, 0, (Part(batch, None),), (upstream,))


def test_a_repeated_record_changes_nothing() -> None:
    """Applying the current version again returns that version; rows, ledger and step count are unchanged."""
    table = shard_table()
    assert table.apply_(record(1, 1)) == 1
    rows = table.weights.clone()
    assert table.apply_(record(1, 1)) == 1
    assert torch.equal(table.weights, rows)
    assert table.num_commits == 1
    assert table.ledger.outcome("a", 1) == Outcome(b"x", 1, 0)


@pytest.mark.parametrize("version", [0, 1, 4, 99])
def test_a_record_out_of_turn_is_refused(version: int) -> None:
    """A shard at version 2 applies 3, accepts a repeat of 2, and refuses any other version without a change."""
    table = shard_table()
    table.apply_(record(1, 1))
    table.apply_(record(2, 2))
    rows = table.weights.clone()
    write = RowWrite(version, torch.arange(11), torch.zeros(11, 5).double(), None)
    for change in (lambda: table.apply_(record(version, 3)), lambda: table.write_(write)):
        with pytest.raises(VersionGap):
            change()
    assert table.version == 2
    assert torch.equal(table.weights, rows)
    assert table.apply_(record(3, 3)) == 3


def test_a_write_is_a_version_but_no_step() -> None:
    """Rows overwritten as version 2 do not count in the ledger or for bias correction, which see commits only."""
    table = shard_table()
    table.apply_(record(1, 1))
    write = RowWrite(2, torch.tensor([10, 0]), torch.arange(10.0).view(2, 5).double(), torch.tensor([5.0, 6.0]))
    assert table.write_(write) == table.write_(write) == 2
    assert table.num_commits == 1
    read = table.read(torch.tensor([0, 10]))
    assert read.rows.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert read.biases.tolist() == [6.0, 5.0]
    assert read.version == 2
    assert [r.version for r in table.records_since(0)] == [2]
    assert [r.version for r in table.records_since(1)] == [2]
    assert table.apply_(record(3, 2)) == 3
    assert table.num_commits == 2
