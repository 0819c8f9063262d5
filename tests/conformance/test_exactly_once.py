"""An acknowledged step is applied exactly once. This file states the promise; test_exactly_once_cases.py has the rest.

The key of a step is (table, session, step). The witness is exact and needs no floats: the table counts the labels of
its commits, and each step here has one label, so the count is the number of steps that were applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import shardloss
from shardloss.errors import StepReused, StepTooOld, TableUnavailable, TicketAborted
from shardloss.v1 import loss_pb2
from shardloss_server.cluster.group import WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import Server

from .faulty import FaultyGroup
from .oracle import Batch, random_batch
from .raw import RawTrainer, once

V, D = 13, 5
EXTENTS = ("all", "first", "last", "none")  # the workers that apply a step before its reply is lost


@pytest.fixture(scope="module")
def group() -> Iterator[FaultyGroup]:
    """Two workers whose replies are lost on demand."""
    local = LocalGroup(2)
    yield FaultyGroup(local)
    local.close()


@pytest.fixture(scope="module")
def client(group: FaultyGroup) -> Iterator[shardloss.LossClient]:
    server = Server(group, ServerConfig())
    server.start()
    with shardloss.connect(server.address) as client:
        yield client
    server.stop(grace_s=1.0)


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Iterator[shardloss.Table]:
    table = client.create_table(fresh_name(), num_classes=V, dim=D, num_shards=3, count_labels=True)
    yield table
    client.delete_table(table.name)


@pytest.fixture
def batch(rng: np.random.Generator) -> Batch:
    """A batch of one row with one label."""
    return random_batch(rng, V, D, num_rows=1, num_true=1)


@pytest.fixture
def trainer(table: shardloss.Table) -> RawTrainer:
    """A session whose calls are tried once, so that the test decides what is repeated."""
    return RawTrainer(table, "trainer")


def num_applied(table: shardloss.Table) -> int:
    """Return the number of steps that the table has applied, derived from the labels that it has counted."""
    learned = table.read_class_counts(0, V).learned
    assert learned is not None
    return int(learned.sum()) - V


def test_a_step_is_applied_by_the_time_it_is_acknowledged(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    commit = trainer.scored(1, batch, 0.1)
    assert num_applied(table) == 0
    assert trainer.send(commit).version == 1
    assert num_applied(table) == 1


def test_a_repeat_is_answered_and_not_applied(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    commit = trainer.scored(1, batch, 0.1)
    trainer.send(commit)
    repeated = trainer.send(commit)
    assert (repeated.version, repeated.replayed) == (1, True)
    assert num_applied(table) == 1


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_step_whose_reply_was_lost_is_applied_once(
    group: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str
) -> None:
    """After a repeat the step is applied once, whether all, some or none of the shards had applied it before."""
    commit = trainer.scored(1, batch, 0.1)
    group.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(commit)
    assert trainer.send(commit).version == 1
    assert num_applied(table) == 1


def test_concurrent_repeats_are_applied_once(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    commit = trainer.scored(1, batch, 0.1)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(trainer.send, [commit] * 8))
    assert [result.version for result in results] == [1] * 8
    assert sum(not result.replayed for result in results) == 1
    assert num_applied(table) == 1


def test_another_payload_under_a_used_key_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    commit = trainer.scored(1, batch, 0.1)
    trainer.send(commit)
    commit.learning_rate = 0.2
    with pytest.raises(StepReused):
        trainer.send(commit)
    assert num_applied(table) == 1


def test_steps_of_a_session_only_grow(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    late = trainer.scored(1, batch, 0.1)
    trainer.send(trainer.scored(2, batch, 0.1))
    with pytest.raises(StepTooOld):
        trainer.send(late)
    assert num_applied(table) == 1


def test_an_aborted_step_is_never_applied(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    commit = trainer.scored(1, batch, 0.1)
    once(trainer.losses.Abort, loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1))
    with pytest.raises(TicketAborted):
        trainer.send(commit)
    assert num_applied(table) == 0


def test_trainers_whose_replies_get_lost_lose_and_double_nothing(
    group: FaultyGroup, table: shardloss.Table, batch: Batch, rng: np.random.Generator
) -> None:
    """All 30 steps of three trainers are applied once if a third of the replies are lost and calls are repeated."""
    for _ in range(10):
        group.lose(EXTENTS[rng.integers(4)], WorkerLost("lost"))

    def train(name: str) -> list[int]:
        trainer, versions = RawTrainer(table, name), []
        for step in range(1, 11):
            commit = repeated(lambda step=step: trainer.scored(step, batch, 0.1))
            versions.append(repeated(lambda commit=commit: trainer.send(commit)).version)
        return versions

    with ThreadPoolExecutor(3) as pool:
        acknowledged = sorted(version for versions in pool.map(train, "abc") for version in versions)
    assert acknowledged == list(range(1, 31))  # each step created its own version
    assert num_applied(table) == 30


def repeated(call: Callable[[], Any]) -> Any:
    """Repeat a call while the table is unavailable and return its answer."""
    for _ in range(100):
        with suppress(TableUnavailable):
            return call()
    raise AssertionError("the table did not become available")
