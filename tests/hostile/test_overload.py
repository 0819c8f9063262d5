"""Excess calls are refused with a hint, silent calls and dead peers are dropped, and every gauge returns to 0."""

from __future__ import annotations

import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import shardloss
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from shardloss import wire
from shardloss.errors import LimitExceeded, Overloaded, ServerUnavailable, ShardlossError
from shardloss.v1 import loss_pb2, server_pb2, server_pb2_grpc
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, Listening, ServerConfig
from shardloss_server.rpc.serve import Server

from tests.conformance.faulty import FaultyGroup

from ..patience import PATIENCE_S, eventually
from .http2 import Connection
from .world import LIMITS, World, once

COMPUTE_LOSS, INFO = "/shardloss.v1.LossService/ComputeLoss", "/shardloss.v1.ServerService/GetServerInfo"
DETAILS_KEY = "grpc-status-details-bin"


@contextmanager
def serving(num_threads: int = 48, **limits: float) -> Iterator[tuple[Server, FaultyGroup]]:
    """Run a server with low limits over a group that the test can block."""
    inner = LocalGroup(1)
    group = FaultyGroup(inner)
    listening = Listening(port=0, admin_port=0, num_threads=num_threads)
    server = Server(group, ServerConfig(listening, dataclasses.replace(LIMITS, **limits)))
    server.start()
    try:
        yield server, group
    finally:
        server.stop(grace_s=0.5)
        inner.close()


def assert_idle(server: Server) -> None:
    """Wait until every gauge is 0 again."""
    handlers = server.handlers
    counted = (handlers.admission, handlers.commits, handlers.stream_bytes)
    eventually(lambda: server.gate.num_inside == server.gate.arriving.num_streams == 0, "an empty gate")
    eventually(lambda: all(places.num_calls == places.num_bytes == 0 for places in counted), "free places")
    eventually(lambda: handlers.streams.num_streams == handlers.unsent.num_bytes == 0, "the end of streams and replies")
    eventually(lambda: server.catalog.turns.num_held == server.catalog.turns.num_waiting == 0, "no turns")


def retry_info(failure: grpc.RpcError) -> float:
    """Return the retry hint of a refusal in seconds, read from its RetryInfo; 0 without one."""
    details = dict(failure.trailing_metadata())[DETAILS_KEY]
    for packed in status_pb2.Status.FromString(details).details:
        info = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            return info.retry_delay.ToMilliseconds() / 1000
    return 0.0


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\1\0abc"], ids=["nothing", "a beginning"])
def test_calls_whose_message_does_not_come_are_dropped(fresh_name: Callable[[], str], sent: bytes) -> None:
    """Incomplete calls on one connection do not block others; they are dropped and release what they occupied."""
    with serving(max_calls_arriving=8, max_message_s=2.0) as (server, _), Connection(server.address) as silent:
        for _ in range(60):
            silent.call(COMPUTE_LOSS, sent)
        eventually(lambda: server.gate.arriving.num_streams > 2, "silent calls")
        with shardloss.connect(server.address) as client:
            world = World(server, client, fresh_name())
            world.assert_untouched()
        assert server.gate.arriving.num_refused > 0
        eventually(lambda: server.gate.arriving.num_dropped > 2, "the end of the silent calls")
        assert_idle(server)


def test_silent_calls_do_not_silence_the_admin_port() -> None:
    """The admin port still answers health checks when one connection has opened as many silent calls as it may."""
    with serving(max_message_s=1.0) as (server, _), Connection(server.admin_address) as silent:
        for _ in range(60):
            silent.call("/grpc.health.v1.Health/Check")
        eventually(lambda: server.admin_gate.num_inside > 0, "silent calls")
        with grpc.insecure_channel(server.admin_address) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        eventually(lambda: server.admin_gate.num_inside == 0, "the end of the silent calls")


def test_what_finds_no_thread_is_refused_with_a_hint() -> None:
    """The gate refuses the call before its message is read, with RESOURCE_EXHAUSTED and RetryInfo."""
    with serving(num_threads=16, max_calls_arriving=4, max_message_s=PATIENCE_S) as (server, _), ExitStack() as open_:
        for _ in range(12):
            silent = open_.enter_context(Connection(server.address))
            silent.call(COMPUTE_LOSS)
        eventually(lambda: server.gate.arriving.num_streams >= 4, "full places")
        channel = open_.enter_context(grpc.insecure_channel(server.address))
        with pytest.raises(grpc.RpcError) as refused:
            server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_info(refused.value) > 0


def test_the_fewest_threads_leave_one_for_refusals(fresh_name: Callable[[], str]) -> None:
    """With two losses, a commit, a stream and a silent call in progress, the next call is refused at once."""
    with serving(num_threads=4, max_message_s=200.0, stream_idle_s=200.0) as (server, group), ExitStack() as open_:
        client = open_.enter_context(shardloss.connect(server.address))
        world, go = World(server, client, fresh_name()), threading.Event()
        commit = world.commit()
        open_.callback(go.set)
        group.before_score = group.before_apply = lambda: go.wait(PATIENCE_S)
        calls = [client.losses.Commit.future(commit, timeout=PATIENCE_S)]
        eventually(lambda: server.handlers.commits.num_calls == 1, "the commit")
        for number in (1, 2):
            calls.append(client.losses.ComputeLoss.future(world.full(), timeout=PATIENCE_S))
            eventually(lambda number=number: server.handlers.admission.num_calls == number, "the losses")
        for method in ("/shardloss.v1.LossService/StreamLoss", COMPUTE_LOSS):
            open_.enter_context(Connection(server.address)).call(method)
        eventually(lambda: server.gate.num_inside == 5, "a full gate")
        channel = open_.enter_context(grpc.insecure_channel(server.address))
        with pytest.raises(grpc.RpcError) as refused:
            server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_info(refused.value) > 0


def test_a_reply_that_nobody_reads_is_dropped() -> None:
    """A reply that the client does not read is dropped after max_message_s, although its handler has finished."""
    with serving(max_message_s=0.5) as (server, _), Connection(server.address, window=0) as deaf:
        for _ in range(20):
            deaf.call(INFO, b"\0\0\0\0\0", is_whole=True)
        eventually(lambda: server.handlers.unsent.num_bytes > 0, "unread replies")
        eventually(lambda: server.handlers.unsent.num_dropped == 20, "the end of their calls")
        assert_idle(server)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the server check for stalled calls every 0.05 s."""
    monkeypatch.setattr("shardloss_server.rpc.serve.WATCH_INTERVAL_S", 0.05)


@pytest.mark.usefixtures("soon")
def test_reflection_that_nobody_reads_does_not_silence_health() -> None:
    """Reflection calls that fill the admin port are dropped, although their handlers wait for the client."""
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    message = b"\0" + struct.pack("!I", len(request)) + request
    with serving(max_message_s=0.5) as (server, _), Connection(server.admin_address, window=0) as deaf:
        for _ in range(60):
            deaf.call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", message, is_whole=True)
        eventually(lambda: server.admin_gate.num_inside > 0, "unread replies")
        eventually(lambda: server.admin_gate.num_inside == server.admin_gate.arriving.num_streams == 0, "their end")
        assert server.admin_gate.arriving.num_dropped > 0


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("port", ["data", "admin"])
def test_a_watcher_of_health_that_reads_nothing_holds_up_nobody(port: str) -> None:
    """The watcher, which needs no credentials, is dropped; other callers are answered on both ports meanwhile."""
    with serving(max_message_s=0.5) as (server, _):
        addresses = {"data": server.address, "admin": server.admin_address}
        with Connection(addresses[port], window=0) as deaf:
            deaf.call("/grpc.health.v1.Health/Watch", b"\0\0\0\0\0", is_whole=True)
            eventually(lambda: server.health.watching.num_streams == 1, "a watcher")
            for address in addresses.values():
                with grpc.insecure_channel(address) as channel:
                    reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            eventually(lambda: server.health.watching.num_dropped == 1, "its end")
            eventually(lambda: server.health.watching.num_streams == server.admin_gate.num_inside == 0, "its place")
            assert_idle(server)


def test_watchers_of_health_are_bounded_and_hold_no_thread() -> None:
    """One connection gets at most half of the watch places; more are refused with a hint, and calls are answered."""
    with serving(num_threads=16) as (server, _), grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(140)]
        firsts = [once_of(watch) for watch in watches]
        refused = [first for first in firsts if isinstance(first, grpc.RpcError)]
        assert len(refused) >= 140 - 129
        assert all(retry_info(failure) > 0 for failure in refused)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        for watch in watches:
            watch.cancel()
        eventually(lambda: server.health.watching.num_streams == 0, "free places")


def once_of(watch: Iterator[health_pb2.HealthCheckResponse]) -> health_pb2.HealthCheckResponse | grpc.RpcError:
    """Return the first reply of a Watch, or its error."""
    try:
        return next(watch)
    except grpc.RpcError as failure:
        return failure


def test_who_watches_health_is_told_of_a_stop_and_does_not_hold_it_up() -> None:
    """A watcher receives NOT_SERVING and its watch ends; only calls in progress make the server wait."""
    with serving() as (server, _), grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
        server.stop(grace_s=PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        assert [reply.status for reply in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_every_refusal_of_an_overload_has_a_hint_and_is_counted(fresh_name: Callable[[], str]) -> None:
    """If 30 calls compete for 4 places, each refusal has a retry hint, and the other calls are answered."""
    with serving(max_calls_in_flight=4) as (server, group), shardloss.connect(server.address) as client:
        world = World(server, client, fresh_name())
        go = threading.Event()
        group.before_score = lambda: go.wait(PATIENCE_S)
        calls = [client.losses.ComputeLoss.future(world.full(), timeout=PATIENCE_S) for _ in range(30)]
        eventually(lambda: sum(call.done() for call in calls) >= 26, "the refusals")
        go.set()
        refused = [call for call in calls if call.exception() is not None]
        assert 26 <= len(refused) < 30
        assert all(call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_info(call) > 0 for call in refused)
        assert len({retry_info(call) for call in refused}) > 10, "clients with equal hints would retry at the same time"
        assert server.handlers.admission.num_refused + server.gate.arriving.num_refused == len(refused)
        assert_idle(server)


def test_the_client_comes_back_when_the_hint_says(fresh_name: Callable[[], str]) -> None:
    """20 concurrent callers with 2 places all finish, because the client repeats refused calls."""
    with serving(max_calls_in_flight=2) as (server, _), shardloss.connect(server.address) as client:
        world = World(server, client, fresh_name())
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: world.table.read_rows(np.arange(3)).version, range(40)))
        assert answers == [3] * 40
        assert_idle(server)


def test_abandoned_sessions_and_tickets_are_forgotten(fresh_name: Callable[[], str]) -> None:
    """Tickets expire after ticket_ttl_s and sessions after session_ttl_s; an expired session can start again."""
    with serving(ticket_ttl_s=0.3, session_ttl_s=0.6) as (server, _), shardloss.connect(server.address) as client:
        table = client.create_table(fresh_name(), num_classes=11, dim=5)
        hidden, labels = np.ones((2, 5), np.float32), np.zeros(2, int)
        sessions = [table.session() for _ in range(50)]
        for session in sessions:
            session.compute_loss(hidden, labels, shardloss.FullSoftmax())
        assert server.catalog.num_sessions > 0
        eventually(lambda: server.catalog.budget.num_tickets == server.catalog.num_sessions == 0, "empty gauges")
        assert server.catalog.budget.num_bytes == 0
        again = sessions[0].compute_loss(hidden, labels, shardloss.FullSoftmax())
        assert sessions[0].commit([(again, None)], learning_rate=0.1).version == 1


def test_a_commit_in_flight_at_a_stop_is_answered(fresh_name: Callable[[], str]) -> None:
    """Health reports NOT_SERVING, new calls raise ServerUnavailable, and the commit in progress still completes."""
    with serving() as (server, group), shardloss.connect(server.address) as client, ExitStack() as open_:
        world = World(server, client, fresh_name())
        entered, go = threading.Event(), threading.Event()
        group.before_apply = lambda: (entered.set(), go.wait(PATIENCE_S))
        open_.callback(go.set)
        committing = client.losses.Commit.future(world.commit(), timeout=PATIENCE_S)
        assert entered.wait(PATIENCE_S)
        stopping = threading.Thread(target=lambda: server.stop(grace_s=PATIENCE_S))
        stopping.start()
        channel = open_.enter_context(grpc.insecure_channel(server.admin_address))
        health = health_pb2_grpc.HealthStub(channel)
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        eventually(lambda: health.Check(health_pb2.HealthCheckRequest()).status == not_serving, "NOT_SERVING")
        with pytest.raises(ServerUnavailable):
            once(client.losses.ComputeLoss, world.full())
        assert not committing.done()
        go.set()
        assert committing.result(PATIENCE_S).version == 4
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()


@pytest.mark.usefixtures("soon")
def test_a_bug_while_a_table_is_settled_does_not_end_the_watch(fresh_name: Callable[[], str]) -> None:
    """The table is marked as lost, and the server still drops silent calls."""
    with serving(max_message_s=0.5) as (server, group), shardloss.connect(server.address) as client:
        world = World(server, client, fresh_name())

        def bug() -> None:
            raise RuntimeError("a bug")

        group.before_repair = bug
        group.lose("none", TimeoutError())
        with suppress(ShardlossError):
            once(client.losses.Commit, world.commit())
        eventually(lambda: server.catalog.owner(world.name).lost is not None, "the table's loss")
        with Connection(server.address) as silent:
            silent.call(COMPUTE_LOSS)
            eventually(lambda: server.gate.arriving.num_dropped == 1, "the end of the silent call")


class Cable:
    """A proxy to a server that can be cut: it then discards the bytes of both sides without closing a connection."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._target = host, int(port)
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                if not self._is_cut:
                    sink.sendall(content)

    def cut(self) -> None:
        self._is_cut = True

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def test_calls_of_a_peer_behind_a_cut_cable_end(fresh_name: Callable[[], str]) -> None:
    """If a peer stops answering pings, its call ends and releases its place, even without a deadline."""
    with (
        serving(peer_ping_s=1.0, peer_answer_s=1.0, max_deadline_s=600.0) as (server, _),
        shardloss.connect(server.address) as client,
    ):
        world = World(server, client, fresh_name())
        request = world.full()
        request.session, request.step, request.after_step = "open", 9, 8
        with closing(Cable(server.address)) as cable, grpc.insecure_channel(cable.address) as channel:
            call = channel.unary_unary(
                COMPUTE_LOSS, loss_pb2.ComputeLossRequest.SerializeToString, loss_pb2.ComputeLossResponse.FromString
            ).future(request)
            eventually(lambda: server.handlers.admission.num_calls == 1, "the waiting call")
            cable.cut()
            assert_idle(server)
            call.cancel()


@dataclasses.dataclass(frozen=True)
class Exceeded:
    """A limit so low that the losses of a few sessions exceed it, and the expected error."""

    limit: str
    value: float
    error: type[ShardlossError]

    def __str__(self) -> str:
        return self.limit


EXCEEDED = [
    Exceeded("max_open_tickets", 1, Overloaded),
    Exceeded("max_ticket_bytes", 1_000, Overloaded),
    Exceeded("max_ticket_bytes", 20, LimitExceeded),
    Exceeded("max_sessions", 1, Overloaded),
]


@pytest.mark.parametrize("exceeded", EXCEEDED, ids=str)
def test_a_limit_of_tickets_and_sessions_is_kept(exceeded: Exceeded, fresh_name: Callable[[], str]) -> None:
    """The error is Overloaded with a retry hint, or LimitExceeded; aborting a step makes room for another."""
    with serving(**{exceeded.limit: exceeded.value}) as (server, _), shardloss.connect(server.address) as client:
        table = client.create_table(fresh_name(), num_classes=11, dim=5)
        request = loss_pb2.ComputeLossRequest(
            table=table.name,
            hidden=wire.encode(np.ones((2, 5), np.float32)),
            labels=wire.encode(np.zeros(2, int)),
            full_softmax=loss_pb2.FullSoftmax(),
        )

        def loss(session: str) -> loss_pb2.ComputeLossResponse:
            request.session, request.step = session, 1
            return once(client.losses.ComputeLoss, request)

        def open_all() -> None:
            for session in "abcdefgh":
                loss(session)

        with pytest.raises(exceeded.error) as refused:
            open_all()
        if exceeded.error is Overloaded:
            assert refused.value.retry_after_s > 0
            once(client.losses.Abort, loss_pb2.AbortRequest(table=table.name, session="a", step=1))
            assert loss("z").ticket
        request.session, request.step = "", 0
        assert once(client.losses.ComputeLoss, request).loss.inline


def test_a_step_too_large_for_the_tickets_is_refused_without_a_wait(
    fresh_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer whose own step fills the limit gets LimitExceeded with the limit and its value, which the client does
    not repeat; what was accumulated can still be committed."""
    num_rows, dim, num_parts = 16, 512, 6
    limit = int(1.25 * num_parts * num_rows * dim * 4)
    never = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("the client waits"))
    monkeypatch.setattr("shardloss.channel.time", never)
    with (
        serving(max_ticket_bytes=limit, max_dim=dim, max_reply_bytes=1 << 20, max_parts=99) as (server, _),
        shardloss.connect(server.address) as client,
    ):
        table = client.create_table(fresh_name(), num_classes=11, dim=dim)
        head = table.softmax()
        optimizer = head.optimizer(0.1)
        hidden, labels = torch.randn(num_rows, dim, requires_grad=True), torch.zeros(num_rows, dtype=torch.int64)

        def accumulate(num: int) -> None:
            for _ in range(num):
                head(hidden, labels).backward()

        accumulate(num_parts)
        with pytest.raises(LimitExceeded, match=f"max_ticket_bytes = {limit}"):
            accumulate(2)
        optimizer.step()
        accumulate(num_parts)
        optimizer.step()
        assert (table.info().num_commits, table.info().num_open_tickets) == (2, 0)


@pytest.mark.parametrize("kind", ["max_calls_in_flight", "max_commits_in_flight"])
def test_a_limit_of_calls_is_kept(kind: str, fresh_name: Callable[[], str]) -> None:
    """If a call occupies the only place, the next call of its kind is refused, but not one of the other kind."""
    with serving(**{kind: 1}) as (server, group), shardloss.connect(server.address) as client:
        world = World(server, client, fresh_name())
        entered, go = threading.Event(), threading.Event()
        group.before_apply = group.before_score = lambda: (entered.set(), go.wait(PATIENCE_S))
        commits, calls = (client.losses.Commit, world.commit()), (client.losses.ComputeLoss, world.full())
        (method, request), (other, other_request) = (calls, commits) if "calls" in kind else (commits, calls)
        first = method.future(request, timeout=PATIENCE_S)
        assert entered.wait(PATIENCE_S)
        with pytest.raises(Overloaded) as refused:
            once(method, request)
        assert refused.value.retry_after_s > 0
        second = other.future(other_request, timeout=PATIENCE_S)
        eventually(lambda: server.catalog.turns.num_held + server.catalog.turns.num_waiting == 2, "the other call")
        go.set()
        assert first.result(PATIENCE_S)
        assert second.result(PATIENCE_S)
        assert_idle(server)


def test_every_limit_is_reported() -> None:
    """GetServerInfo has a field for every limit, so a client need not find out a limit by being refused."""
    names = {field.name for field in dataclasses.fields(Limits)}
    assert names == {field.name for field in server_pb2.ServerLimits.DESCRIPTOR.fields}
