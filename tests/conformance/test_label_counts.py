"""A commit's labels are counted as often as it is applied: once, even if calls are repeated or replies lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import shardloss
from shardloss.errors import InvalidArgument, ShardlossError, StepTooOld, TableUnavailable, TicketUnknown
from shardloss.v1 import loss_pb2
from shardloss_server.cluster.group import WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import Server
from shardloss_server.shard import table as shard_table

from .faulty import FaultyGroup
from .oracle import Batch, random_batch
from .raw import RawTrainer, once

V, D = 13, 5
RATE = 0.2
_sessions = itertools.count()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)], scope="module")
def faulty(request: pytest.FixtureRequest) -> Iterator[FaultyGroup]:
    """A group over two workers that loses replies on demand."""
    if request.param == "ray":
        yield FaultyGroup(request.getfixturevalue("ray_server").catalog.group)
        return
    group = LocalGroup(2)
    yield FaultyGroup(group)
    group.close()


@pytest.fixture(scope="module")
def connection(faulty: FaultyGroup) -> Iterator[shardloss.LossClient]:
    server = Server(faulty, ServerConfig())
    server.start()
    with shardloss.connect(server.address, timeout_s=30.0) as client:
        yield client
    server.stop(grace_s=1.0)


@pytest.fixture
def table(connection: shardloss.LossClient, fresh_name: Callable[[], str]) -> Iterator[shardloss.Table]:
    name = fresh_name()
    yield connection.create_table(name, num_classes=V, dim=D, num_shards=3, placement="mod", count_labels=True)
    connection.delete_table(name)


@pytest.fixture
def trainer(table: shardloss.Table) -> RawTrainer:
    return RawTrainer(table, f"counting-{next(_sessions)}")


@pytest.fixture
def batch(rng: np.random.Generator) -> Batch:
    """A batch without the label 0, so that class 0 is never counted."""
    batch = random_batch(rng, V, D)
    np.maximum(batch.labels, 1, out=batch.labels)
    return batch


def counts_of(table: shardloss.Table) -> np.ndarray:
    """Return the number of times each class was counted, derived from the expected counts of a draw: p ~ 1 + count."""
    drawn = table.sample_candidates(5, sampler="learned_unigram", unique=False, labels=np.arange(V))
    expected = drawn.true_expected_count[:, 0]
    return np.rint(expected / expected[0]).astype(int) - 1


def labels_of(batch: Batch) -> np.ndarray:
    return np.bincount(batch.labels.ravel(), minlength=V)


def test_a_commit_counts_its_labels_once(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """Scoring counts no labels, and neither does a repeat of the commit, even if it is sent eight times at once."""
    request = trainer.scored(1, batch, RATE)
    assert not counts_of(table).any()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(trainer.send, [request] * 8))
    np.testing.assert_array_equal(counts_of(table), labels_of(batch))
    assert trainer.send(request).replayed
    np.testing.assert_array_equal(counts_of(table), labels_of(batch))


def test_a_one_call_step_counts_its_labels_once(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """The labels are counted once even if the call is repeated."""
    for _ in range(3):
        once(table.client.losses.ComputeLoss, trainer.one_call(1, batch, RATE))
    np.testing.assert_array_equal(counts_of(table), labels_of(batch))


@pytest.mark.parametrize("way", ["commit", "one call"])
@pytest.mark.parametrize("extent", ["all", "first", "last", "none"])
def test_a_lost_reply_counts_once(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str, way: str
) -> None:
    """However many workers applied the step before its reply was lost, its labels are counted once."""
    request = trainer.scored(1, batch, RATE) if way == "commit" else trainer.one_call(1, batch, RATE)
    method = table.client.losses.Commit if way == "commit" else table.client.losses.ComputeLoss
    faulty.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        once(method, request)
    for _ in range(3):
        once(method, request)
        np.testing.assert_array_equal(counts_of(table), labels_of(batch))


@pytest.mark.parametrize("extent", ["all", "first", "none"])
def test_a_step_that_somebody_else_settles_counts_once(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str
) -> None:
    """A read before the repeat finds the labels counted if the step was applied; after it they are counted once."""
    request = trainer.scored(1, batch, RATE)
    faulty.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(request)
    table.read_rows(np.arange(V))
    np.testing.assert_array_equal(counts_of(table), labels_of(batch) * (extent != "none"))
    trainer.send(request)
    np.testing.assert_array_equal(counts_of(table), labels_of(batch))


def test_what_is_refused_or_given_up_is_not_counted(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A wrong g, an unknown ticket, an abort and a step that is too old do not change the counts."""
    ticket = trainer.loss(1, batch).ticket
    for parts, error in (([(ticket, batch.g[:-1])], InvalidArgument), ([(ticket, None), ("no", None)], TicketUnknown)):
        with pytest.raises(error):
            trainer.send(trainer.request(1, parts, RATE))
    once(table.client.losses.Abort, loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1))
    for call in (lambda: trainer.send(trainer.request(1, [(ticket, None)], RATE)), lambda: trainer.loss(1, batch)):
        with pytest.raises(ShardlossError):
            call()
    with pytest.raises(StepTooOld):
        once(table.client.losses.ComputeLoss, trainer.one_call(1, batch, RATE))
    assert not counts_of(table).any()


def test_a_step_without_memory_is_not_counted(
    faulty: FaultyGroup,
    table: shardloss.Table,
    trainer: RawTrainer,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that fails for lack of memory counts no labels; its repeat counts them."""
    if not isinstance(faulty.inner, LocalGroup):
        pytest.skip("the workers' memory is out of reach")
    request = trainer.scored(1, batch, RATE)

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(shard_table, "touched_gradient", fail)
        with pytest.raises(TableUnavailable):
            trainer.send(request)
        assert not counts_of(table).any()
    trainer.send(request)
    np.testing.assert_array_equal(counts_of(table), labels_of(batch))


def test_parts_of_one_step_count_each(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """The labels of two committed micro-batches are both counted; those of a third, not in the commit, are not."""
    tickets = [trainer.loss(1, batch, part).ticket for part in range(3)]
    trainer.send(trainer.request(1, [(ticket, batch.g) for ticket in tickets[:2]], RATE))
    np.testing.assert_array_equal(counts_of(table), 2 * labels_of(batch))
