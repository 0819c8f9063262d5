"""The promise of test_exactly_once.py in all cases: steps repeated, lost, late, refused, aborted or concurrent."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import shardloss
from shardloss import chunks, messages, wire
from shardloss.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    Overloaded,
    RowsLost,
    ServerUnavailable,
    SessionExpired,
    ShardlossError,
    Stale,
    StepReused,
    StepTooOld,
    TableNotFound,
    TableUnavailable,
    TicketAborted,
    TicketExpired,
    TicketUnknown,
)
from shardloss.splice import Spliced
from shardloss.v1 import loss_pb2, table_pb2
from shardloss_server.cluster.group import ShardMissing, WorkerLost
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, Listening, ServerConfig
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.rpc.serve import Server
from shardloss_server.shard import table as shard_table
from shardloss_server.shard.kept import KEPT_BYTES

from ..patience import PATIENCE_S, eventually
from .faulty import FaultyGroup
from .oracle import Batch, Replica, random_batch
from .raw import TRY_S, RawTrainer, loss_request, once

NUM_CLASSES, DIM, NUM_SHARDS = 13, 5, 3  # three shards over two workers: one worker holds two of them
RATE = 0.2
ALL = np.arange(NUM_CLASSES)
KINDS = pytest.mark.parametrize("num_sampled", [0, 6], ids=["full", "sampled"])
_sessions = itertools.count()


GROUPS = [
    "local",
    "nothing kept",
    pytest.param("ray_workers", marks=pytest.mark.ray),
    pytest.param("plain_workers", marks=pytest.mark.ray),
]


@pytest.fixture(params=GROUPS, scope="module")
def faulty(request: pytest.FixtureRequest) -> Iterator[FaultyGroup]:
    """A group over two workers that loses replies on demand, with each fast path on and off.

    By default a test runs on threads and on one of the other groups, which rotate from test to test (conftest.py).
    """
    if request.param.endswith("workers"):
        yield FaultyGroup(request.getfixturevalue(request.param))
        return
    group = LocalGroup(2, kept_bytes=KEPT_BYTES if request.param == "local" else 0)
    yield FaultyGroup(group)
    group.close()


@pytest.fixture(scope="module")
def server(faulty: FaultyGroup) -> Iterator[Server]:
    """A separate front end over the faulty group."""
    with serving(faulty, Limits()) as server:
        yield server


@contextmanager
def serving(group: FaultyGroup, limits: Limits) -> Iterator[Server]:
    server = Server(group, ServerConfig(limits=limits))
    server.start()
    yield server
    server.stop(grace_s=1.0)


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address, timeout_s=PATIENCE_S) as client:
        yield client


def make_table(client: shardloss.LossClient, name: str) -> shardloss.Table:
    return client.create_table(
        name,
        num_classes=NUM_CLASSES,
        dim=DIM,
        dtype="float64",
        num_shards=NUM_SHARDS,
        placement="mod",
        initializer=shardloss.Normal(0.5, seed=1),
    )


@pytest.fixture
def table(server: Server, connection: shardloss.LossClient, fresh_name: Callable[[], str]) -> Iterator[shardloss.Table]:
    """A float64 table, so that a difference of 1e-10 is a wrong gradient and not rounding.

    Deleting the table releases all its tickets; the fixture checks that none is still accounted for.
    """
    table = make_table(connection, fresh_name())
    yield table
    connection.delete_table(table.name)
    assert (server.catalog.budget.num_tickets, server.catalog.budget.num_bytes) == (0, 0)


@pytest.fixture
def trainer(table: shardloss.Table) -> RawTrainer:
    return new_trainer(table)


def new_trainer(table: shardloss.Table) -> RawTrainer:
    return RawTrainer(table, f"session-{next(_sessions)}")


@pytest.fixture
def batch(rng: np.random.Generator) -> Batch:
    return random_batch(rng, NUM_CLASSES, DIM)


def replica_of(table: shardloss.Table) -> Replica:
    """Return a copy of the table's rows and biases, bit for bit."""
    rows = table.read_rows(ALL)
    assert rows.biases is not None
    return Replica(rows.rows.copy(), rows.biases.copy())


def assert_same_bits(table: shardloss.Table, replica: Replica) -> None:
    now = replica_of(table)
    np.testing.assert_array_equal(now.rows, replica.rows)
    np.testing.assert_array_equal(now.biases, replica.biases)


def assert_is(table: shardloss.Table, replica: Replica) -> None:
    now = replica_of(table)
    replica.assert_close(now.rows, now.biases)


def assert_settled(server: Server, table: shardloss.Table, version: int) -> None:
    """Assert that the front end and every shard report `version`."""
    assert table.read_rows(ALL[:1]).version == version
    assert table.info().version == version
    assert (
        server.catalog.group.applied_versions(server.catalog.owner(table.name).key).result(PATIENCE_S)
        == [version] * NUM_SHARDS
    )


def together(*calls: Callable[[], object]) -> list[object]:
    """Run calls at once, each in its own thread, and return their results; an error counts as a result."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait(PATIENCE_S)
        try:
            return call()
        except ShardlossError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# A step and its repeats


@KINDS
def test_a_commit_is_one_sgd_step(
    server: Server, table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator, num_sampled: int
) -> None:
    """A scored and committed batch moves rows by -lr times the gradient of g . loss, and every shard by one version."""
    batch = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled)
    expected = replica_of(table).step([batch], RATE)
    result = trainer.send(trainer.scored(1, batch, RATE))
    assert (result.version, result.staleness, result.replayed) == (1, 0, False)
    assert_is(table, expected)
    assert_settled(server, table, 1)
    assert table.info().num_open_tickets == 0


@KINDS
def test_scores_are_those_of_the_reference(
    table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator, num_sampled: int
) -> None:
    """A ticket's loss and hidden gradient equal the reference's, and opening it changes no row."""
    batch, before = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled), replica_of(table)
    result = trainer.loss(1, batch)
    np.testing.assert_allclose(result.loss, before.loss(batch), rtol=1e-10)
    np.testing.assert_allclose(result.hidden_grad, before.gradients([batch])[2][0], rtol=1e-10, atol=1e-12)
    assert result.ticket
    assert table.info().num_open_tickets == 1
    assert_same_bits(table, before)


def test_a_repeated_commit_is_answered_and_not_applied(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """The same payload under the same key gets the stored outcome, and no bit of the table changes."""
    request = trainer.scored(1, batch, RATE)
    first = trainer.send(request)
    before = replica_of(table)
    for _ in range(3):
        again = trainer.send(request)
        assert again == dataclasses.replace(first, replayed=True)
    assert_same_bits(table, before)
    assert_settled(server, table, 1)


def test_an_earlier_step_is_still_answered_after_later_ones(
    table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator
) -> None:
    """The ledger keeps several recent outcomes, not only the last one."""
    requests = []
    for step in (1, 2, 3):
        requests.append(trainer.scored(step, random_batch(rng, NUM_CLASSES, DIM), RATE))
        trainer.send(requests[-1])
    before = replica_of(table)
    for version, request in enumerate(requests, start=1):
        again = trainer.send(request)
        assert (again.version, again.replayed) == (version, True)
    assert_same_bits(table, before)


OTHER_PAYLOADS: dict[str, Callable[[loss_pb2.CommitRequest], None]] = {
    "learning rate": lambda request: setattr(request, "learning_rate", 0.3),
    "grad scale": lambda request: setattr(request, "grad_scale", 2.0),
    "upstream": lambda request: request.parts[0].ClearField("g"),
    "ticket": lambda request: setattr(request.parts[0], "ticket", "another"),
    "number of parts": lambda request: request.parts.add(ticket="another"),
}


@pytest.mark.parametrize("what", OTHER_PAYLOADS)
def test_another_payload_under_a_used_key_is_refused(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch, what: str
) -> None:
    """StepReused is raised, the table keeps its bits, and the first payload is still answered."""
    request = trainer.scored(1, batch, RATE)
    trainer.send(request)
    before = replica_of(table)
    other = loss_pb2.CommitRequest()
    other.CopyFrom(request)
    OTHER_PAYLOADS[what](other)
    with pytest.raises(StepReused) as caught:
        trainer.send(other)
    assert caught.value.field == "step"
    assert_same_bits(table, before)
    assert trainer.send(request).replayed


SAME_PAYLOADS: dict[str, Callable[[loss_pb2.CommitRequest], None]] = {
    "a default written out": lambda request: setattr(request, "grad_scale", 1.0),
    "another condition": lambda request: setattr(request, "max_staleness", 3),
    "its cost wanted": lambda request: setattr(request, "want_cost", True),
    "a field of a later contract": lambda request: request.MergeFromString(b"\xfa\x3f\x01x"),
}


@pytest.mark.parametrize("what", SAME_PAYLOADS)
def test_a_commit_that_differs_in_nothing_that_is_applied_is_a_repeat(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch, what: str
) -> None:
    """It is answered from the ledger, and no bit of the table changes."""
    request = trainer.scored(1, batch, RATE)
    first = trainer.send(request)
    before = replica_of(table)
    other = loss_pb2.CommitRequest()
    other.CopyFrom(request)
    SAME_PAYLOADS[what](other)
    assert other.SerializeToString() != request.SerializeToString()
    again = trainer.send(other)
    assert (again.replayed, again.version, again.staleness) == (True, first.version, first.staleness)
    assert_same_bits(table, before)


def test_a_step_repeated_after_a_renaming_is_answered(
    connection: shardloss.LossClient, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """The name is not part of the payload: commits, losses and one-call steps are repeated under name or reference."""
    commit = trainer.scored(1, batch, RATE)
    trainer.send(commit)
    one_call = trainer.one_call(2, batch, RATE)
    once(trainer.losses.ComputeLoss, one_call)
    loss = loss_request(table.name, trainer.session, 3, 0, batch)
    ticket = once(trainer.losses.ComputeLoss, loss).ticket
    moved = connection.rename_table(table.name, f"{table.name}.moved")
    before = replica_of(moved)
    for name in (moved.name, table.reference, moved.reference):
        commit.table = one_call.table = loss.table = name
        assert trainer.send(commit).replayed
        assert once(trainer.losses.ComputeLoss, one_call).committed.replayed
        assert once(trainer.losses.ComputeLoss, loss).ticket == ticket
    assert_same_bits(moved, before)
    connection.rename_table(moved.name, table.name)


def test_a_repeated_one_call_step_need_not_wait_for_the_same_step(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """after_step says when a loss may be scored, not what is applied."""
    trainer.send(trainer.scored(1, batch, RATE))
    request = trainer.one_call(2, batch, RATE)
    request.after_step = 1
    once(trainer.losses.ComputeLoss, request)
    before = replica_of(table)
    request.ClearField("after_step")
    assert once(trainer.losses.ComputeLoss, request).committed.replayed
    assert_same_bits(table, before)


def test_a_loss_may_be_repeated_as_a_stream(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """The same loss in chunks, with its ids as int32 and [N, 1], gets the kept reply and the same ticket."""
    first = trainer.loss(1, batch)
    request = loss_request(table.name, trainer.session, 1, 0, batch)
    request.labels.CopyFrom(wire.encode(batch.labels.astype(np.int32).reshape(len(batch.hidden), -1)))
    beside = Spliced(request, request.hidden.inline)
    request.hidden.ClearField("inline")
    header, parts = chunks.detach(beside, "hidden", 64)
    pieces = [Spliced(loss_pb2.StreamLossRequest(header=header))]
    pieces += [chunks.spliced(part, loss_pb2.StreamLossRequest) for part in parts]
    assert len(pieces) > 2
    reply = next(iter(table.client.stream_loss(iter(pieces), timeout=TRY_S)))
    assert (reply.message.header.ticket, reply.message.header.replayed) == (first.ticket, True)
    assert table.info().num_open_tickets == 1


def test_concurrent_identical_commits_are_applied_once(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """One of eight simultaneous commits is applied, and seven are answered from the ledger."""
    expected = replica_of(table).step([batch], RATE)
    request = trainer.scored(1, batch, RATE)
    results = together(*[lambda: trainer.send(request)] * 8)
    assert sorted(result.replayed for result in results) == [False] + [True] * 7
    assert {result.version for result in results} == {1}
    assert_is(table, expected)
    assert_settled(server, table, 1)


def test_of_concurrent_different_commits_under_one_key_one_is_applied(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """Whichever commit wins, the others are refused with StepReused."""
    before, ticket = replica_of(table), trainer.loss(1, batch).ticket
    rates = [0.1, 0.2, 0.3, 0.4]
    results = together(
        *[lambda rate=rate: trainer.send(trainer.request(1, [(ticket, batch.g)], rate)) for rate in rates]
    )
    won = [i for i, result in enumerate(results) if not isinstance(result, ShardlossError)]
    assert len(won) == 1
    assert all(isinstance(result, StepReused) for i, result in enumerate(results) if i not in won)
    assert_is(table, before.step([batch], rates[won[0]]))
    assert_settled(server, table, 1)


def test_a_learning_rate_of_zero_is_a_step(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A learning rate of 0 creates a version and uses up the key, although no row changes."""
    before = replica_of(table)
    assert trainer.send(trainer.scored(1, batch, 0.0)).version == 1
    assert_same_bits(table, before)
    assert table.info().num_commits == 1


def test_g_is_scaled_and_is_ones_where_absent(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A commit without g and with grad_scale s is a step over s times the summed loss."""
    expected = replica_of(table).step([dataclasses.replace(batch, g=np.full(len(batch.g), -1.5))], RATE)
    request = trainer.request(1, [(trainer.loss(1, batch).ticket, None)], RATE)
    request.grad_scale = -1.5
    trainer.send(request)
    assert_is(table, expected)


@KINDS
def test_uneven_parts_make_one_step(
    server: Server, table: shardloss.Table, rng: np.random.Generator, num_sampled: int
) -> None:
    """Gradient accumulation: three micro-batches of 4, 0 and 3 rows over one draw equal the batch of 7."""
    batch = random_batch(rng, NUM_CLASSES, DIM, num_rows=7, num_sampled=num_sampled)
    expected = replica_of(table).step([batch], RATE)
    pieces = [batch.rows(slice(0, 4)), batch.rows(slice(4, 4)), batch.rows(slice(4, 7))]
    session = table.session()
    results = [session.compute_loss(piece.hidden, piece.labels, piece.loss) for piece in pieces]
    whole = table.compute_loss(batch.hidden, batch.labels, batch.loss).loss
    np.testing.assert_allclose(np.concatenate([r.loss for r in results]), whole, rtol=1e-12)
    session.commit([(r, piece.g) for r, piece in zip(results, pieces, strict=True)], learning_rate=RATE)
    assert_is(table, expected)
    assert_settled(server, table, 1)


def test_parts_that_a_commit_leaves_out_are_given_up(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A step is committed once, so tickets left out of the commit cannot be committed later."""
    expected = replica_of(table).step([batch], RATE)
    request, left_out = trainer.scored(1, batch, RATE), trainer.loss(1, batch, part=1)
    trainer.send(request)
    assert table.info().num_open_tickets == 0
    with pytest.raises(StepReused):
        trainer.send(trainer.request(1, [(left_out.ticket, batch.g)], RATE))
    with pytest.raises(TicketAborted):
        trainer.send(trainer.request(2, [(left_out.ticket, batch.g)], RATE))
    assert_is(table, expected)


# Tickets that cannot be committed


def refused(table: shardloss.Table, kind: type[ShardlossError], call: Callable[[], object]) -> ShardlossError:
    """Assert that a call raises exactly `kind` and changes neither rows nor version; return the error."""
    before, version = replica_of(table), table.info().version
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert_same_bits(table, before)
    assert table.info().version == version
    return caught.value


def test_a_commit_after_an_abort_is_refused(table: shardloss.Table, batch: Batch) -> None:
    """An abort closes the ticket and uses up the step; the next step can be committed."""
    session = table.session()
    result = session.compute_loss(batch.hidden, batch.labels, batch.loss)
    trainer = RawTrainer(table, session.name)
    assert session.abort() == 1
    assert table.info().num_open_tickets == 0
    error = refused(table, TicketAborted, lambda: trainer.send(trainer.request(1, [(result.ticket, batch.g)], RATE)))
    assert (error.field, error.index) == ("parts", "0")
    refused(table, StepTooOld, lambda: trainer.loss(1, batch))
    assert trainer.send(trainer.scored(2, batch, RATE)).version == 1


def test_an_abort_gives_up_all_earlier_steps_and_no_later_one(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """Aborting step 2 closes the parts of steps 1 and 2; step 3 can still be committed."""
    tickets = {(step, part): trainer.loss(step, batch, part).ticket for step in (1, 2, 3) for part in (0, 1)}
    request = loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=2)
    assert once(trainer.losses.Abort, request).num_aborted == 4
    assert once(trainer.losses.Abort, request).num_aborted == 0
    for step in (1, 2):
        commit = trainer.request(step, [(tickets[step, 0], batch.g)], RATE)
        refused(table, TicketAborted, lambda commit=commit: trainer.send(commit))
    expected = replica_of(table).step([batch, batch], RATE)
    trainer.send(trainer.request(3, [(tickets[3, part], batch.g) for part in (0, 1)], RATE))
    assert_is(table, expected)


def test_a_commit_after_expiry_is_refused(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """A ticket expires ticket_ttl_s after its session's last call; a new one of the same step may be opened."""
    request = trainer.scored(1, batch, RATE)
    ttl_s = server.config.limits.ticket_ttl_s
    assert server.catalog.expire_tickets(time.monotonic() + 0.9 * ttl_s) == 0
    assert server.catalog.expire_tickets(time.monotonic() + 1.1 * ttl_s) >= 1
    assert table.info().num_open_tickets == 0
    error = refused(table, TicketExpired, lambda: trainer.send(request))
    assert (error.field, error.index) == ("parts", "0")
    expected = replica_of(table).step([batch], RATE)
    trainer.send(trainer.scored(1, batch, RATE))
    assert_is(table, expected)


def test_a_server_expires_tickets_by_itself(fresh_name: Callable[[], str], batch: Batch) -> None:
    """With a ttl of 0.2 s an idle ticket is closed within seconds, and its bytes are released."""
    group = LocalGroup(1)
    limits = dataclasses.replace(Limits(), ticket_ttl_s=0.2)
    with serving(FaultyGroup(group), limits) as server, shardloss.connect(server.address) as client:
        table = make_table(client, fresh_name())
        trainer = new_trainer(table)
        request = trainer.scored(1, batch, RATE)
        eventually(lambda: table.info().num_open_tickets == 0, "the expiry of a ticket")
        refused(table, TicketExpired, lambda: trainer.send(request))
        assert (server.catalog.budget.num_tickets, server.catalog.budget.num_bytes) == (0, 0)
    group.close()


def test_an_older_step_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """After step 5, neither a loss nor a commit of step 4 is accepted: the steps of a session only increase."""
    late = trainer.scored(4, batch, RATE)
    trainer.send(trainer.scored(5, batch, RATE))
    assert refused(table, StepTooOld, lambda: trainer.send(late)).field == "step"
    refused(table, StepTooOld, lambda: trainer.loss(4, batch))
    assert table.info().num_open_tickets == 0


def test_an_unknown_session_or_ticket_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A commit may only name tickets of its own session; tickets of other sessions and invented ones are refused."""
    mine, stranger = trainer.scored(1, batch, RATE), new_trainer(table)
    ticket = mine.parts[0].ticket
    theft = stranger.request(1, [(ticket, batch.g)], RATE)
    assert refused(table, SessionExpired, lambda: stranger.send(theft)).field == "session"
    stranger.loss(1, batch)
    assert refused(table, TicketUnknown, lambda: stranger.send(theft)).index == "0"
    invented = trainer.request(1, [(ticket, batch.g), ("no-such-ticket", batch.g)], RATE)
    assert refused(table, TicketUnknown, lambda: trainer.send(invented)).index == "1"
    assert trainer.send(mine).version == 1


def test_a_ticket_of_another_step_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A step cannot commit parts of another step; the ticket stays open for its own step."""
    ticket = trainer.loss(1, batch).ticket
    wrong = trainer.request(2, [(ticket, batch.g)], RATE)
    error = refused(table, InvalidArgument, lambda: trainer.send(wrong))
    assert (error.field, error.index) == ("parts", "0")
    assert trainer.send(trainer.request(1, [(ticket, batch.g)], RATE)).version == 1


def test_g_of_another_length_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """g must have one entry per row of its ticket."""
    ticket = trainer.loss(1, batch).ticket
    wrong = trainer.request(1, [(ticket, batch.g[:-1])], RATE)
    assert refused(table, InvalidArgument, lambda: trainer.send(wrong)).field == "parts[0].g"
    assert trainer.send(trainer.request(1, [(ticket, batch.g)], RATE)).version == 1


# Repeated losses


def test_a_repeated_loss_gets_the_kept_reply(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """While the ticket is open, a repeat gets the same bits and the same ticket, even after the table has changed."""
    first = trainer.loss(1, batch)
    other = new_trainer(table)
    other.send(other.scored(1, batch, RATE))
    again = trainer.loss(1, batch)
    assert again.replayed
    assert not first.replayed
    assert (again.ticket, again.version) == (first.ticket, first.version)
    for field in ("loss", "lse", "hidden_grad"):
        np.testing.assert_array_equal(getattr(again, field), getattr(first, field))
    assert table.info().num_open_tickets == 1


def test_another_loss_under_an_open_key_is_refused(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """StepReused is raised; the first ticket stays open and commits its own batch."""
    expected = replica_of(table).step([batch], RATE)
    request = trainer.scored(1, batch, RATE)
    other = dataclasses.replace(batch, hidden=batch.hidden + 1.0)
    refused(table, StepReused, lambda: trainer.loss(1, other))
    trainer.send(request)
    assert_is(table, expected)


def test_concurrent_identical_losses_open_one_ticket(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """All calls get the same reply, which only one of them computed."""
    results = together(*[lambda: trainer.loss(1, batch)] * 6)
    assert len({result.ticket for result in results}) == 1
    assert [result.replayed for result in results].count(False) == 1
    assert table.info().num_open_tickets == 1


# The one-call form


def test_a_repeated_one_call_step_is_applied_once(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """A repeat gets the same loss, hidden gradient and outcome, and changes no bit of the table."""
    before = replica_of(table)
    request = trainer.one_call(1, batch, RATE)
    first = messages.loss_result(once(trainer.losses.ComputeLoss, request))
    assert first.committed is not None
    assert (first.ticket, first.committed.version, first.replayed) == ("", 1, False)
    np.testing.assert_allclose(first.loss, before.loss(batch), rtol=1e-10)
    after = replica_of(table)
    again = messages.loss_result(once(trainer.losses.ComputeLoss, request))
    assert again.replayed
    assert again.committed == dataclasses.replace(first.committed, replayed=True)
    np.testing.assert_array_equal(again.loss, first.loss)
    np.testing.assert_array_equal(again.hidden_grad, first.hidden_grad)
    assert_same_bits(table, after)
    assert_is(table, before.step([batch], RATE))
    assert_settled(server, table, 1)
    assert table.info().num_open_tickets == 0


def test_another_one_call_payload_under_the_key_is_refused(
    table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """StepReused is raised for another batch, learning rate or upstream gradient."""
    once(trainer.losses.ComputeLoss, trainer.one_call(1, batch, RATE))
    others = [
        trainer.one_call(1, batch, 2 * RATE),
        trainer.one_call(1, dataclasses.replace(batch, g=-batch.g), RATE),
        trainer.one_call(1, dataclasses.replace(batch, hidden=-batch.hidden), RATE),
    ]
    for other in others:
        refused(table, StepReused, lambda other=other: once(trainer.losses.ComputeLoss, other))


def test_concurrent_identical_one_call_steps_are_applied_once(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """One of six simultaneous calls is applied, and all get its loss."""
    before = replica_of(table)
    request = trainer.one_call(1, batch, RATE)
    results = together(*[lambda: messages.loss_result(once(trainer.losses.ComputeLoss, request))] * 6)
    assert [result.committed.replayed for result in results].count(False) == 1
    for result in results:
        np.testing.assert_allclose(result.loss, before.loss(batch), rtol=1e-10)
    assert_is(table, before.step([batch], RATE))
    assert_settled(server, table, 1)


@KINDS
def test_a_train_step_equals_loss_and_commit(
    connection: shardloss.LossClient,
    table: shardloss.Table,
    fresh_name: Callable[[], str],
    rng: np.random.Generator,
    num_sampled: int,
) -> None:
    """Both forms leave the same rows, step after step."""
    twin = make_table(connection, fresh_name())
    one, two = table.session(), twin.session()
    for _ in range(3):
        batch = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled)
        done = one.train_step(batch.hidden, batch.labels, batch.loss, learning_rate=RATE, upstream=batch.g)
        scored = two.compute_loss(batch.hidden, batch.labels, batch.loss)
        two.commit([(scored, batch.g)], learning_rate=RATE)
        np.testing.assert_array_equal(done.loss, scored.loss)
    assert_same_bits(table, replica_of(twin))
    connection.delete_table(twin.name)


# Lost replies


LOST = {"time": (TimeoutError("lost"), DeadlineExceeded), "worker": (WorkerLost("lost"), TableUnavailable)}
LOSSES = pytest.mark.parametrize("cause", LOST)
EXTENTS = pytest.mark.parametrize("extent", ["all", "first", "last", "none"])


@LOSSES
@EXTENTS
@KINDS
def test_a_commit_whose_reply_was_lost_is_applied_once(
    faulty: FaultyGroup,
    server: Server,
    table: shardloss.Table,
    trainer: RawTrainer,
    rng: np.random.Generator,
    cause: str,
    extent: str,
    num_sampled: int,
) -> None:
    """The repeat is answered and the table settled, whether all, some or none of the shards had applied the commit."""
    batch = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled)
    expected = replica_of(table).step([batch], RATE)
    request = trainer.scored(1, batch, RATE)
    error, shown = LOST[cause]
    faulty.lose(extent, error)
    with pytest.raises(shown):
        trainer.send(request)
    again = trainer.send(request)
    assert (again.version, again.replayed) == (1, extent != "none")
    assert_is(table, expected)
    assert_settled(server, table, 1)
    assert trainer.send(request).replayed
    next_batch = random_batch(rng, NUM_CLASSES, DIM)
    assert trainer.send(trainer.scored(2, next_batch, RATE)).version == 2
    assert_is(table, expected.step([next_batch], RATE))


@EXTENTS
def test_the_client_repeats_a_lost_commit_by_itself(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, batch: Batch, extent: str
) -> None:
    """Session.commit returns as if no reply had been lost; only `replayed` shows it."""
    expected = replica_of(table).step([batch], RATE)
    session = table.session()
    result = session.compute_loss(batch.hidden, batch.labels, batch.loss)
    faulty.lose(extent, WorkerLost("lost"))
    committed = session.commit([(result, batch.g)], learning_rate=RATE)
    assert (committed.version, committed.replayed) == (1, extent != "none")
    assert_is(table, expected)
    assert_settled(server, table, 1)


@EXTENTS
def test_a_one_call_step_whose_reply_was_lost_is_applied_once(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str
) -> None:
    """The repeat still gets the loss that was computed before the step."""
    before = replica_of(table)
    request = trainer.one_call(1, batch, RATE)
    faulty.lose(extent, TimeoutError("lost"))
    with pytest.raises(DeadlineExceeded):
        once(trainer.losses.ComputeLoss, request)
    again = messages.loss_result(once(trainer.losses.ComputeLoss, request))
    np.testing.assert_allclose(again.loss, before.loss(batch), rtol=1e-10)
    assert_is(table, before.step([batch], RATE))
    assert_settled(server, table, 1)


@EXTENTS
@pytest.mark.parametrize("form", ["commit", "one call"])
def test_a_settled_step_leaves_no_ticket_open(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str, form: str
) -> None:
    """A step closes the tickets that it used, even if it is only later found to be applied."""
    faulty.lose(extent, WorkerLost("lost"))
    if form == "commit":
        method, request = trainer.losses.Commit, trainer.scored(1, batch, RATE)
    else:
        method, request = trainer.losses.ComputeLoss, trainer.one_call(1, batch, RATE)
    with pytest.raises(TableUnavailable):
        once(method, request)
    once(method, request)
    assert table.info().num_open_tickets == 0


@EXTENTS
@pytest.mark.parametrize("visitor", ["reader", "scorer", "evaluator", "trainer", "writer"])
def test_whoever_comes_next_settles_the_table(
    faulty: FaultyGroup,
    server: Server,
    table: shardloss.Table,
    trainer: RawTrainer,
    batch: Batch,
    extent: str,
    visitor: str,
) -> None:
    """After a lost reply, other callers see all of the step or nothing of it, and the repeat is still answered."""
    before = replica_of(table)
    applied = extent != "none"
    expected = before.step([batch], RATE) if applied else before
    request = trainer.scored(1, batch, RATE)
    faulty.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(request)
    version = int(applied)
    if visitor == "reader":
        assert table.read_rows(ALL[:3]).version == version
    elif visitor == "scorer":
        result = table.compute_loss(batch.hidden, batch.labels, batch.loss)
        assert result.version == version
        np.testing.assert_allclose(result.loss, expected.loss(batch), rtol=1e-10)
    elif visitor == "evaluator":
        assert table.evaluate(batch.hidden, batch.labels[:, 0]).version == version
    elif visitor == "trainer":
        other = new_trainer(table)
        assert other.send(other.scored(1, batch, RATE)).version == version + 1
        expected = expected.step([batch], RATE)
        version += 1
    else:
        assert table.write_rows(ALL[:1], np.ones((1, DIM)), np.ones(1)) == version + 1
        expected = Replica(expected.rows.copy(), expected.biases.copy())
        expected.rows[0], expected.biases[0] = 1.0, 1.0
        version += 1
    assert_is(table, expected)
    assert_settled(server, table, version)
    again = trainer.send(request)
    assert again.replayed == applied
    assert again.version == (1 if applied else version + 1)


@EXTENTS
def test_a_score_waits_while_another_settles_the_table(
    faulty: FaultyGroup,
    server: Server,
    table: shardloss.Table,
    trainer: RawTrainer,
    batch: Batch,
    extent: str,
) -> None:
    """A loss that arrives while the shards are being brought to one version waits; it is not refused."""
    request = trainer.scored(1, batch, RATE)
    repairing, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        repairing.set()
        assert go_on.wait(PATIENCE_S)

    faulty.before_repair = hold
    faulty.lose(extent, WorkerLost("lost"))
    with ThreadPoolExecutor(2) as pool:
        try:
            with pytest.raises(TableUnavailable):
                trainer.send(request)
            # The server's own watch may begin the repair instead of this call.
            settling = pool.submit(server.catalog.settle, Deadline.after(PATIENCE_S))
            assert repairing.wait(PATIENCE_S)
            scoring = pool.submit(new_trainer(table).loss, 1, batch)
            with pytest.raises(TimeoutError):
                scoring.result(0.2)
        finally:
            faulty.before_repair = lambda: None
            go_on.set()
        assert scoring.result(PATIENCE_S).version == int(extent != "none")
        settling.result(PATIENCE_S)


@EXTENTS
def test_a_row_write_whose_reply_was_lost_is_whole_or_absent(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, extent: str
) -> None:
    """WriteRows is applied on all shards or on none; the client's repeat writes the same values as another version."""
    expected = replica_of(table)
    rows = np.arange(3.0 * DIM).reshape(3, DIM)
    faulty.lose(extent, WorkerLost("lost"))
    version = table.write_rows(ALL[:3], rows)
    expected.rows[:3] = rows
    assert version == (1 if extent == "none" else 2)
    assert_same_bits(table, expected)
    assert_settled(server, table, version)


def test_replies_may_be_lost_again_and_again(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, rng: np.random.Generator
) -> None:
    """Twelve steps, most of which lose a reply, give the same rows as twelve steps without a fault."""
    expected = replica_of(table)
    session = table.session()
    extents = [None, "all", "first", "none", "last", "first"] * 2
    for extent in extents:
        batch = random_batch(rng, NUM_CLASSES, DIM)
        result = session.compute_loss(batch.hidden, batch.labels, batch.loss)
        if extent is not None:
            faulty.lose(extent, WorkerLost("lost"))
        session.commit([(result, batch.g)], learning_rate=RATE)
        expected = expected.step([batch], RATE)
    assert_is(table, expected)
    assert_settled(server, table, len(extents))
    assert table.info().num_commits == len(extents)


@EXTENTS
def test_an_abort_tells_whether_a_lost_step_was_applied(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str
) -> None:
    """A ticket is either committed or aborted: num_aborted excludes tickets whose step turns out to be applied."""
    request = trainer.scored(1, batch, RATE)
    faulty.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(request)
    abort = loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1)
    num_aborted = once(trainer.losses.Abort, abort).num_aborted
    assert table.read_rows(ALL[:1]).version == 1 - num_aborted
    assert num_aborted == (1 if extent == "none" else 0)


@EXTENTS
def test_another_payload_after_a_lost_reply_is_no_repeat(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch, extent: str
) -> None:
    """StepReused is raised if the lost step was applied; if it was not, its key is still free."""
    before = replica_of(table)
    request = trainer.scored(1, batch, RATE)
    faulty.lose(extent, WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(request)
    request.learning_rate = rate = 2 * RATE
    if extent == "none":
        assert not trainer.send(request).replayed
    else:
        rate = RATE
        with pytest.raises(StepReused):
            trainer.send(request)
    assert_is(table, before.step([batch], rate))
    assert_settled(server, table, 1)


@pytest.mark.parametrize(
    "error, kind", [(RuntimeError("a bug"), Internal), (ShardMissing("restarted"), RowsLost)], ids=["bug", "missing"]
)
def test_a_table_that_may_be_damaged_is_lost_and_can_be_made_anew(
    faulty: FaultyGroup,
    connection: shardloss.LossClient,
    fresh_name: Callable[[], str],
    batch: Batch,
    error: Exception,
    kind: type[ShardlossError],
) -> None:
    """If a shard fails in a step or is missing, every later call raises RowsLost until the table is created again."""
    name = fresh_name()
    table = make_table(connection, name)
    first = replica_of(table)
    trainer = new_trainer(table)
    request = trainer.scored(1, batch, RATE)
    faulty.lose("first", error)
    with pytest.raises(kind):
        trainer.send(request)
    for call in (lambda: trainer.send(request), lambda: table.read_rows(ALL), lambda: trainer.loss(2, batch)):
        with pytest.raises(RowsLost):
            call()
    assert table.client.table(name).spec.num_open_tickets == 0
    connection.delete_table(name)
    table = make_table(connection, name)
    assert_same_bits(table, first)
    trainer = new_trainer(table)
    trainer.send(trainer.scored(1, batch, RATE))
    assert_is(table, first.step([batch], RATE))
    connection.delete_table(name)


def test_a_commit_that_outlives_its_deadline_is_applied_once(
    fresh_name: Callable[[], str], rng: np.random.Generator
) -> None:
    """A worker that is slower than the deadline applies the step late; the repeat finds it applied."""
    group, batch = LocalGroup(2), random_batch(rng, NUM_CLASSES, DIM)
    with serving(FaultyGroup(group), Limits()) as server, shardloss.connect(server.address) as client:
        table = make_table(client, fresh_name())
        trainer = new_trainer(table)
        expected = replica_of(table).step([batch], RATE)
        request = trainer.scored(1, batch, RATE)
        release = threading.Event()
        group._threads[1].submit(release.wait, PATIENCE_S)  # the second worker is busy until released
        try:
            for _ in range(2):
                with pytest.raises(DeadlineExceeded):
                    trainer.send(request, timeout_s=0.2)
        finally:
            release.set()
        again = trainer.send(request)
        assert (again.version, again.replayed) == (1, True)
        assert_is(table, expected)
        assert_settled(server, table, 1)
    group.close()


def test_a_commit_whose_deadline_passes_in_the_queue_changes_nothing(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, rng: np.random.Generator
) -> None:
    """A commit that times out while another one is under way is not applied; its repeat is applied once."""
    batches = [random_batch(rng, NUM_CLASSES, DIM) for _ in range(2)]
    slow, late = new_trainer(table), new_trainer(table)
    slow_request, late_request = slow.scored(1, batches[0], RATE), late.scored(1, batches[1], RATE)
    expected = replica_of(table).step([batches[0]], RATE)
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(PATIENCE_S)

    faulty.before_apply = hold
    with ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(slow.send, slow_request)
            assert entered.wait(PATIENCE_S)
            with pytest.raises(DeadlineExceeded):
                late.send(late_request, timeout_s=0.2)
            with pytest.raises(DeadlineExceeded):  # same queue: the server has given up the late commit
                once(late.losses.Abort, loss_pb2.AbortRequest(table=table.name, session="nobody", step=1), 0.3)
        finally:
            faulty.before_apply = lambda: None
            release.set()
        assert first.result(PATIENCE_S).version == 1
    assert_is(table, expected)
    result = late.send(late_request)
    assert (result.version, result.staleness, result.replayed) == (2, 1, False)
    assert_is(table, expected.step([batches[1]], RATE))
    assert_settled(server, table, 2)


def test_an_expiry_in_the_middle_of_a_commit_loses_nothing(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator
) -> None:
    """A ticket that expires while its commit scores it again is committed or refused; the table stays consistent."""
    batch, other = random_batch(rng, NUM_CLASSES, DIM), new_trainer(table)
    request = trainer.scored(1, batch, RATE)
    other.send(other.scored(1, batch, RATE))
    before = replica_of(table)
    faulty.before_score = lambda: server.catalog.expire_tickets(time.monotonic() + 1e6)
    try:
        result = trainer.send(request)
    except TicketExpired:
        expected, version = before, 1
    else:
        expected, version = before.step([batch], RATE), result.version
    finally:
        faulty.before_score = lambda: None
    assert_is(table, expected)
    assert_settled(server, table, version)
    assert table.info().num_open_tickets == 0


# Several trainers


@pytest.mark.parametrize("lossy", [False, True], ids=["all well", "replies lost"])
def test_interleaved_trainers_equal_the_serial_replay(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, rng: np.random.Generator, lossy: bool
) -> None:
    """Steps of concurrent sessions are applied one after another: replaying them by version gives the same rows.

    This is also true if every third step loses its reply after some, all or none of the workers applied it.
    """
    num_trainers, num_steps = 3, 8
    expected = replica_of(table)
    batches = {
        (who, step): random_batch(rng, NUM_CLASSES, DIM, num_sampled=(0, 6)[who % 2])
        for who in range(num_trainers)
        for step in range(num_steps)
    }
    by_version: dict[int, tuple[int, int]] = {}
    extents = itertools.cycle(["", "", "first", "", "", "all", "", "", "last", "", "", "none"])

    def lose_some() -> None:
        extent = next(extents)
        if extent:
            faulty.lose(extent, WorkerLost("lost"))

    def train(who: int) -> int:
        session, num_replayed = table.session(), 0
        for step in range(num_steps):
            batch = batches[who, step]
            result = session.compute_loss(batch.hidden, batch.labels, batch.loss)
            committed = session.commit([(result, batch.g)], learning_rate=RATE / (1 + who))
            num_replayed += committed.replayed
            assert committed.version not in by_version
            by_version[committed.version] = who, step
        return num_replayed

    if lossy:
        faulty.before_apply = lose_some
    try:
        with ThreadPoolExecutor(num_trainers) as pool:
            num_replayed = sum(pool.map(train, range(num_trainers), timeout=PATIENCE_S))
    finally:
        faulty.before_apply = lambda: None
    assert (num_replayed > 0) == lossy
    assert sorted(by_version) == list(range(1, num_trainers * num_steps + 1))
    for version in sorted(by_version):
        who, step = by_version[version]
        expected = expected.step([batches[who, step]], RATE / (1 + who))
    assert_is(table, expected)
    assert_settled(server, table, num_trainers * num_steps)
    assert table.info().num_open_tickets == 0


@KINDS
def test_a_stale_commit_applies_the_gradient_at_the_version_before_it(
    table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator, num_sampled: int
) -> None:
    """If two other steps are applied between scoring and commit, the gradient is that of the rows after them."""
    batch = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled)
    scored_at = replica_of(table)
    request = trainer.scored(1, batch, RATE)
    other = new_trainer(table)
    for step in (1, 2):
        other.send(other.scored(step, random_batch(rng, NUM_CLASSES, DIM, num_sampled=0), 1.0))
    moved = replica_of(table)
    result = trainer.send(request)
    assert (result.version, result.staleness) == (3, 2)
    expected = moved.step([batch], RATE)
    assert_is(table, expected)
    stale_step = scored_at.step([batch], RATE).rows - scored_at.rows
    assert np.abs(stale_step - (expected.rows - moved.rows)).max() > 1e-3


def test_staleness_is_that_of_the_oldest_part(
    table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator
) -> None:
    """Parts scored at versions 0 and 1 make one step at version 1: staleness 1, all gradients at version 1."""
    batches = [random_batch(rng, NUM_CLASSES, DIM, num_sampled=s) for s in (0, 6)]
    old = trainer.loss(1, batches[0], part=0)
    other = new_trainer(table)
    other.send(other.scored(1, random_batch(rng, NUM_CLASSES, DIM), 1.0))
    fresh = trainer.loss(1, batches[1], part=1)
    assert (old.version, fresh.version) == (0, 1)
    expected = replica_of(table).step(batches, RATE)
    parts = [(old.ticket, batches[0].g), (fresh.ticket, batches[1].g)]
    assert trainer.send(trainer.request(1, parts, RATE)).staleness == 1
    assert_is(table, expected)


def test_a_written_row_counts_as_staleness(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """A row write also increments the version, and the next commit uses the written rows."""
    request = trainer.scored(1, batch, RATE)
    table.write_rows(ALL[:2], np.full((2, DIM), 0.25))
    expected = replica_of(table).step([batch], RATE)
    assert trainer.send(request).staleness == 1
    assert_is(table, expected)


def test_max_staleness_refuses_what_is_older(
    table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator
) -> None:
    """A stale commit changes nothing and leaves the ticket open, so its step may be committed with a higher limit."""
    batch, other = random_batch(rng, NUM_CLASSES, DIM), new_trainer(table)
    request = trainer.scored(1, batch, RATE)
    for step in (1, 2):
        other.send(other.scored(step, random_batch(rng, NUM_CLASSES, DIM), RATE))
    for limit in (0, 1):
        request.max_staleness = limit
        refused(table, Stale, lambda: trainer.send(request))
    assert table.info().num_open_tickets == 1
    request.max_staleness = 2
    expected = replica_of(table).step([batch], RATE)
    assert trainer.send(request).staleness == 2
    assert_is(table, expected)


# Waiting for a step


def test_after_step_waits_until_the_step_is_applied(
    server: Server, table: shardloss.Table, trainer: RawTrainer, rng: np.random.Generator
) -> None:
    """A loss with after_step = 1 is scored at a version that includes step 1, even if it was sent earlier."""
    batches = [random_batch(rng, NUM_CLASSES, DIM) for _ in range(2)]
    expected = replica_of(table).step([batches[0]], RATE)
    commit = trainer.scored(1, batches[0], RATE)
    request = trainer.one_call(2, batches[1], RATE)
    request.ClearField("commit_now")
    request.after_step = 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(once, trainer.losses.ComputeLoss, request)
        eventually(lambda: table.info().num_open_tickets == 2, "the waiting loss")
        assert not waiting.done()
        trainer.send(commit)
        result = messages.loss_result(waiting.result(PATIENCE_S))
    assert result.version == 1
    np.testing.assert_allclose(result.loss, expected.loss(batches[1]), rtol=1e-10)
    trainer.send(trainer.request(2, [(result.ticket, batches[1].g)], RATE))
    assert_is(table, expected.step([batches[1]], RATE))
    assert_settled(server, table, 2)


def test_after_step_gives_up_at_the_deadline(table: shardloss.Table, trainer: RawTrainer, batch: Batch) -> None:
    """DeadlineExceeded leaves no ticket open; once the step is applied, a repeat of the loss is answered."""
    commit = trainer.scored(1, batch, RATE)
    request = trainer.one_call(2, batch, RATE)
    request.ClearField("commit_now")
    request.after_step = 1
    with pytest.raises(DeadlineExceeded):
        once(trainer.losses.ComputeLoss, request, 0.2)
    eventually(lambda: table.info().num_open_tickets == 1, "the end of the late call")
    trainer.send(commit)
    assert once(trainer.losses.ComputeLoss, request).version == 1


@pytest.mark.parametrize("end", ["abort", "delete"])
def test_after_step_does_not_wait_for_what_will_not_come(
    server: Server, connection: shardloss.LossClient, fresh_name: Callable[[], str], batch: Batch, end: str
) -> None:
    """A loss that waits for a step is refused as soon as the step is aborted or the table is deleted."""
    table = make_table(connection, fresh_name())
    trainer = new_trainer(table)
    trainer.loss(1, batch)
    request = trainer.one_call(2, batch, RATE)
    request.ClearField("commit_now")
    request.after_step = 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(once, trainer.losses.ComputeLoss, request)
        eventually(lambda: table.info().num_open_tickets == 2, "the waiting loss")
        if end == "abort":
            once(trainer.losses.Abort, loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1))
        else:
            connection.delete_table(table.name)
        with pytest.raises(StepTooOld if end == "abort" else TableNotFound):
            waiting.result(PATIENCE_S)
    if end == "abort":
        assert table.info().num_open_tickets == 0
        connection.delete_table(table.name)
    assert server.catalog.budget.num_tickets == 0


def test_a_server_that_stops_lets_go_of_who_waits_for_a_step(fresh_name: Callable[[], str], batch: Batch) -> None:
    """A waiting loss with a long deadline does not delay the stop of the server."""
    group = LocalGroup(1)
    server = Server(group, ServerConfig(Listening(port=0, admin_port=0)))
    server.start()
    with shardloss.connect(server.address) as client:
        table = make_table(client, fresh_name())
        trainer = new_trainer(table)
        trainer.loss(1, batch)
        request = trainer.one_call(2, batch, RATE)
        request.ClearField("commit_now")
        request.after_step = 1
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(once, trainer.losses.ComputeLoss, request)
            eventually(lambda: table.info().num_open_tickets == 2, "the waiting loss")
            server.stop(grace_s=0.0)
            with pytest.raises(ServerUnavailable):
                waiting.result(PATIENCE_S)
    eventually(lambda: server.handlers.admission.num_calls == 0, "the end of the waiting call")
    group.close()


# After refusals and departed callers


@pytest.mark.parametrize("scale", [1e200, 1.0], ids=["upstream", "learning rate"])
def test_a_refused_one_call_step_leaves_nothing(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch, scale: float
) -> None:
    """The error names the field, no ticket stays open, and the corrected request is accepted under the same key."""
    request = trainer.one_call(1, batch, RATE)
    wrong = loss_pb2.ComputeLossRequest()
    wrong.CopyFrom(request)
    if scale > 1:
        wrong.commit_now.grad_scale = scale
        wrong.upstream.CopyFrom(wire.encode(np.full(len(batch.hidden), scale)))
    else:
        wrong.commit_now.learning_rate = float("inf")
    with pytest.raises(InvalidArgument) as refused_call:
        once(trainer.losses.ComputeLoss, wrong)
    assert refused_call.value.field == ("upstream" if scale > 1 else "commit_now.learning_rate")
    assert table.info().num_open_tickets == 0
    assert once(trainer.losses.ComputeLoss, request).committed.version == 1


def test_a_refusal_inside_a_one_call_step_closes_its_ticket(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """The ticket is closed even if the refusal comes from the commit and not from the loss."""
    request = trainer.one_call(1, batch, RATE)
    abort = loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1)
    faulty.before_score = lambda: once(trainer.losses.Abort, abort)
    try:
        with pytest.raises(TicketAborted):
            once(trainer.losses.ComputeLoss, request)
    finally:
        faulty.before_score = lambda: None
    assert table.info().num_open_tickets == 0


def test_weights_or_scales_that_overflow_never_reach_the_rows(
    connection: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """Finite numbers whose sum or product is not finite in the table's dtype are refused; the error names the field."""
    table = connection.create_table(fresh_name(), num_classes=5, dim=2, dtype="float32")
    before = table.read_rows(np.arange(5)).rows
    hidden, labels = np.ones((1, 2), np.float32), np.array([[1, 2]])
    session = table.session()

    def loss(weight: float) -> shardloss.LossResult:
        weights = np.full((1, 2), weight, np.float32)
        return session.compute_loss(hidden, labels, shardloss.FullSoftmax(), label_weights=weights)

    with pytest.raises(InvalidArgument) as refused_call:
        loss(3e38)
    assert refused_call.value.field == "label_weights"
    result = loss(1e20)
    with pytest.raises(InvalidArgument) as refused_call:
        session.commit([(result, np.array([1e30]))], learning_rate=0.1)
    assert refused_call.value.field == "parts[0].g"
    np.testing.assert_array_equal(table.read_rows(np.arange(5)).rows, before)
    connection.delete_table(table.name)


def test_a_caller_who_went_away_waits_no_more(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """A cancelled call that was waiting for a step without a deadline releases its place and its ticket."""
    trainer.loss(1, batch)
    request = trainer.one_call(2, batch, RATE)
    request.ClearField("commit_now")
    request.after_step = 1
    calls = [trainer.losses.ComputeLoss.future(request) for _ in range(3)]
    eventually(lambda: server.handlers.admission.num_calls == 3, "the waiting losses")
    for call in calls:
        call.cancel()
    eventually(lambda: server.handlers.admission.num_calls == 0, "the end of the waiting losses")
    assert table.info().num_open_tickets == 1


def test_a_worker_without_a_shard_of_a_table_is_not_asked(
    server: Server,
    connection: shardloss.LossClient,
    faulty: FaultyGroup,
    fresh_name: Callable[[], str],
    batch: Batch,
) -> None:
    """A table of one shard is still served if a worker that holds none of its shards drops it."""
    name = fresh_name()
    table = connection.create_table(name, num_classes=NUM_CLASSES, dim=DIM, dtype="float64", num_shards=1)
    faulty.inner.start(1, "drop", server.catalog.owner(name).key).result(PATIENCE_S)
    assert table.compute_loss(batch.hidden, batch.labels, shardloss.FullSoftmax()).loss is not None
    connection.delete_table(name)


def test_work_of_a_passed_deadline_is_taken_back(
    faulty: FaultyGroup, server: Server, connection: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """Reads whose callers have given up do not queue up ahead of the next caller's."""
    table = connection.create_table(fresh_name(), num_classes=60_000, dim=16, num_shards=2)
    hidden, labels = np.ones((512, 16), np.float32), np.zeros(512, int)
    request = messages.loss_request(table.name, hidden, labels, shardloss.FullSoftmax(), want_hidden_grad=True)
    began = time.monotonic()
    once(table.client.send_loss, request)
    one_s = time.monotonic() - began
    for _ in range(100):
        with contextlib.suppress(DeadlineExceeded, Overloaded):
            once(table.client.send_loss, request, one_s / 20)
    began = time.monotonic()
    table._send_loss(request)
    after_s = time.monotonic() - began
    began = time.monotonic()
    table._send_loss(request)
    one_s = max(one_s, time.monotonic() - began)  # the machine may have become busy
    assert after_s < 30 * one_s + 1.0
    connection.delete_table(table.name)


def test_a_one_call_reply_outlives_a_settlement_by_somebody_else(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """If the reply of an applied step is lost and another caller settles the table, a repeat still gets its tensors."""
    request = trainer.one_call(1, batch, RATE)
    faulty.lose("all", WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        once(trainer.losses.ComputeLoss, request)
    table.read_rows(ALL)
    again = once(trainer.losses.ComputeLoss, request)
    assert again.replayed
    assert again.committed.version == 1
    assert again.hidden_grad.inline


def test_a_doubt_that_nobody_comes_back_for_is_settled(
    faulty: FaultyGroup, server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """The server itself finds out if a step was applied, and releases its tickets."""
    request = trainer.scored(1, batch, RATE)
    faulty.lose("first", WorkerLost("lost"))
    with pytest.raises(TableUnavailable):
        trainer.send(request)
    owner = server.catalog.owner(table.name)
    eventually(lambda: owner.steps.version == 1 and owner.sessions.num_open == 0, "the settlement")
    assert trainer.send(request).replayed


def test_repeats_whose_callers_went_away_give_their_places_back(
    server: Server, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """Cancelled repeats release their places even while the first call with their key is still waiting."""
    trainer.loss(1, batch)
    request = trainer.one_call(2, batch, RATE)
    request.ClearField("commit_now")
    request.after_step = 1
    calls = [trainer.losses.ComputeLoss.future(request) for _ in range(6)]
    eventually(lambda: server.handlers.admission.num_calls == 6, "the waiting losses")
    for call in calls[1:]:
        call.cancel()
    eventually(lambda: server.handlers.admission.num_calls <= 1, "the end of the repeats")
    calls[0].cancel()
    eventually(lambda: server.handlers.admission.num_calls == 0, "the end of the first")


@KINDS
def test_a_step_without_memory_changes_nothing(
    fresh_name: Callable[[], str], rng: np.random.Generator, num_sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an allocation fails before the first row is written, the table is unchanged and the step can be repeated."""
    group = LocalGroup(2)
    with serving(FaultyGroup(group), Limits()) as server, shardloss.connect(server.address) as client:
        table = make_table(client, fresh_name())
        trainer = new_trainer(table)
        batch = random_batch(rng, NUM_CLASSES, DIM, num_sampled=num_sampled)
        request = trainer.scored(1, batch, RATE)
        before = replica_of(table)

        def fail(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        with monkeypatch.context() as patch:
            patch.setattr(shard_table, "touched_gradient", fail)
            with pytest.raises(TableUnavailable):
                trainer.send(request)
            assert_same_bits(table, before)
        assert trainer.send(request).version == 1
    group.close()


# Forgotten sessions, recreated tables


def test_a_step_of_a_forgotten_session_is_never_applied_twice(
    fresh_name: Callable[[], str], rng: np.random.Generator
) -> None:
    """If a server remembers three sessions, a repeat from a session that it forgot is refused with SessionExpired."""
    group = LocalGroup(1)
    limits = dataclasses.replace(Limits(), max_sessions=3)
    with serving(FaultyGroup(group), limits) as server, shardloss.connect(server.address) as client:
        table = make_table(client, fresh_name())
        trainers = [new_trainer(table) for _ in range(5)]
        batch = random_batch(rng, NUM_CLASSES, DIM)
        commit = trainers[0].scored(1, batch, RATE)
        trainers[0].send(commit)
        one_call = trainers[1].one_call(1, batch, RATE)
        once(table.client.losses.ComputeLoss, one_call)
        for trainer in trainers[2:]:
            trainer.send(trainer.scored(1, batch, RATE))
        refused(table, SessionExpired, lambda: trainers[0].send(commit))
        refused(table, SessionExpired, lambda: once(table.client.losses.ComputeLoss, one_call))
        trainers[1].loss(2, batch)  # an open ticket does not prove that the session is new
        refused(table, SessionExpired, lambda: once(table.client.losses.ComputeLoss, one_call))
    group.close()


def test_an_abort_in_the_middle_of_a_loss_gives_its_ticket_up(
    faulty: FaultyGroup, table: shardloss.Table, trainer: RawTrainer, batch: Batch
) -> None:
    """The loss raises TicketAborted, its step is used up, and no ticket stays open."""
    abort = loss_pb2.AbortRequest(table=table.name, session=trainer.session, step=1)
    faulty.before_score = lambda: once(trainer.losses.Abort, abort)
    try:
        with pytest.raises(TicketAborted):
            trainer.loss(1, batch)
    finally:
        faulty.before_score = lambda: None
    assert table.info().num_open_tickets == 0
    refused(table, StepTooOld, lambda: trainer.loss(1, batch))


def test_a_loss_of_a_table_that_is_deleted_meanwhile_is_refused(
    faulty: FaultyGroup,
    connection: shardloss.LossClient,
    fresh_name: Callable[[], str],
    batch: Batch,
) -> None:
    """TableNotFound is raised instead of using other rows, and a new table of the same name has no ticket of it."""
    name = fresh_name()
    trainer = new_trainer(make_table(connection, name))
    faulty.before_score = lambda: (connection.delete_table(name), make_table(connection, name))
    try:
        with pytest.raises(TableNotFound):
            trainer.loss(1, batch)
    finally:
        faulty.before_score = lambda: None
    assert connection.table(name).info().num_open_tickets == 0
    connection.delete_table(name)


def test_concurrent_creations_make_one_table(connection: shardloss.LossClient, fresh_name: Callable[[], str]) -> None:
    """One of six simultaneous requests with equal specs creates the table, and five return it."""
    name = fresh_name()
    spec = table_pb2.TableSpec(name=name, num_classes=NUM_CLASSES, dim=DIM)
    request = table_pb2.CreateTableRequest(spec=spec)
    replies = together(*[lambda: once(connection.tables.CreateTable, request)] * 6)
    assert [reply.created for reply in replies].count(True) == 1
    assert len({reply.table.SerializeToString() for reply in replies}) == 1
    connection.delete_table(name)


def test_a_late_commit_never_touches_a_new_table_of_the_same_name(
    faulty: FaultyGroup,
    server: Server,
    connection: shardloss.LossClient,
    fresh_name: Callable[[], str],
    batch: Batch,
) -> None:
    """A commit under way while its table is deleted and created again is refused; the new table starts untrained."""
    name = fresh_name()
    trainer = new_trainer(make_table(connection, name))
    request = trainer.scored(1, batch, RATE)
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(PATIENCE_S)

    faulty.before_apply = hold
    with ThreadPoolExecutor(1) as pool:
        try:
            late = pool.submit(trainer.send, request)
            assert entered.wait(PATIENCE_S)
            connection.delete_table(name)
            table = make_table(connection, name)
        finally:
            faulty.before_apply = lambda: None
            release.set()
        assert isinstance(late.exception(PATIENCE_S), ShardlossError)
    before = replica_of(table)
    assert_settled(server, table, 0)
    other = new_trainer(table)
    other.send(other.scored(1, batch, RATE))
    assert_is(table, before.step([batch], RATE))
    connection.delete_table(name)
