"""Arbitrary bytes get a status of the contract from every method and leave the table unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from shardloss import wire
from shardloss.channel import DETAILS_KEY, error_info, error_of
from shardloss.errors import InvalidArgument, LimitExceeded, NotSupported, Overloaded, ShardlossError, TransientError
from shardloss.v1 import evaluation_pb2, loss_pb2, loss_pb2_grpc, server_pb2, table_pb2, tensor_pb2
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Listening, ServerConfig
from shardloss_server.rpc.serve import Server

from ..patience import PATIENCE_S, eventually
from .losses import LOSSES, write_counts
from .world import LIMITS, D, N, World, numbers, once, serving

TRY_S = 120.0
MAX_MESSAGE_BYTES = 1 << 16
MAX_CHUNK_BYTES = 96  # so that hidden [7, 5] of float32 takes two chunks
# Mutated requests may be valid by chance: low limits and a short deadline keep each of them cheap.
RAW_LIMITS = dataclasses.replace(
    LIMITS,
    max_message_bytes=MAX_MESSAGE_BYTES,
    max_chunk_bytes=MAX_CHUNK_BYTES,
    max_request_bytes=4096,
    max_tables=64,
    max_deadline_s=1.0,
)
METHODS: list[MethodDescriptor] = [
    method
    for module in (loss_pb2, table_pb2, evaluation_pb2, server_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
ELSEWHERE = "somebody-elses-table-that-is-not-here"
CHANGING = {"Commit", "Abort", "CreateTable", "DeleteTable", "RenameTable", "WriteRows"}


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(RAW_LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[shardloss.LossClient]:
    with shardloss.connect(server.address) as client:
        yield client


@pytest.fixture
def world(server: Server, connection: shardloss.LossClient, fresh_name: Callable[[], str]) -> Iterator[World]:
    world = World(server, connection, fresh_name())
    yield world
    for info in connection.list_tables():
        connection.delete_table(info.name)


@pytest.fixture
def raw(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


# Bytes


def valid_messages(world: World) -> dict[str, list[Message]]:
    """Return valid requests of every method; those that would change rows name a table that does not exist."""
    requests = [
        world.full(),
        world.drawn(),
        world.values(),
        world.commit(),
        world.abort(),
        world.sample(),
        world.create(),
        world.get(),
        world.delete(),
        world.rename(),
        world.read(),
        world.read_counts(),
        world.write(),
        world.evaluate(),
        world.top_k(),
        world.score(),
        world.sample_classes(),
        write_counts(world),
        *[every(world) for every in LOSSES],
    ]
    by_method: dict[str, list[Message]] = {}
    for request in requests:
        name = type(request).__name__.removesuffix("Request")
        if name == "CreateTable":
            request.spec.name = ELSEWHERE
        elif name in CHANGING:
            request.table = ELSEWHERE
        elif name == "ComputeLoss":
            request.table = world.name
        by_method.setdefault(name, []).append(request)
    by_method["ListTables"] = [table_pb2.ListTablesRequest()]
    by_method["GetServerInfo"] = [server_pb2.GetServerInfoRequest()]
    by_method["StreamLoss"] = [loss_pb2.StreamLossRequest(header=header) for header in by_method["ComputeLoss"]]
    return by_method


def assert_in_contract(failure: grpc.RpcError) -> None:
    """Assert that an error has a reason other than a server bug, or is gRPC's DEADLINE_EXCEEDED or UNIMPLEMENTED."""
    trailing = dict(failure.trailing_metadata() or ())
    info = error_info(trailing[DETAILS_KEY]) if DETAILS_KEY in trailing else None
    if info is None:
        assert failure.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED}, failure
    else:
        assert failure.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), failure
        assert type(error_of(failure)).reason == info.reason


def call_raw(raw: grpc.Channel, method: MethodDescriptor, payloads: list[bytes]) -> list[bytes]:
    """Send bytes to a method without encoding them, and return the bytes of its replies."""
    if method.client_streaming:
        replies = raw.stream_stream(path_of(method))(iter(payloads), timeout=TRY_S)
        return list(replies)
    return [raw.unary_unary(path_of(method))(payloads[0], timeout=TRY_S)]


def test_every_method_has_a_good_request_here(world: World) -> None:
    """A method added to the contract fails this test until it has a request here, so it is fuzzed as well."""
    assert {method.name for method in METHODS} == valid_messages(world).keys()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_cut_of_a_request_gets_a_status_of_the_contract(
    world: World, raw: grpc.Channel, method: MethodDescriptor
) -> None:
    """A request truncated at any of 60 positions never gets UNKNOWN or INTERNAL."""
    content = valid_messages(world)[method.name][-1].SerializeToString()
    for end in sorted({len(content) * i // 60 for i in range(60)}):
        try:
            call_raw(raw, method, [content[:end]])
        except grpc.RpcError as failure:
            assert_in_contract(failure)
    forget_others(world)
    world.assert_untouched()


def forget_others(world: World) -> None:
    """Delete the tables that a mutated CreateTable may have created."""
    for info in world.client.list_tables():
        if info.name != world.name:
            world.client.delete_table(info.name)


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_others_methods_refuse_bytes_that_are_no_request(raw: grpc.Channel, path: str) -> None:
    """gRPC's own health and reflection services also refuse malformed bytes, with INVALID_ARGUMENT and a request id."""
    with pytest.raises(grpc.RpcError) as refused:
        list(raw.stream_stream(path)(iter([b"\xff\xff"]), timeout=TRY_S))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_in_contract(refused.value)
    assert "x-request-id" in dict(refused.value.trailing_metadata())


def test_an_unknown_method_is_unimplemented(world: World, raw: grpc.Channel) -> None:
    """An unknown method, an unknown service and a path without a service are all UNIMPLEMENTED."""
    for path in ("/shardloss.v1.LossService/Nothing", "/nobody/Nothing", "/", "//"):
        with pytest.raises(grpc.RpcError) as caught:
            raw.unary_unary(path)(b"", timeout=TRY_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    world.assert_untouched()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_above_the_limit_never_reaches_a_handler(
    world: World, server: Server, compression: grpc.Compression
) -> None:
    """An 8 MB message is RESOURCE_EXHAUSTED even if gzip shrinks it to a few kB: the limit applies after unpacking."""
    request = world.full()
    request.hidden.CopyFrom(wire.encode(np.zeros((2_000_000 // D, D), np.float32)))
    with grpc.insecure_channel(server.address, compression=compression) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/shardloss.v1.LossService/ComputeLoss")(request.SerializeToString(), timeout=TRY_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    world.assert_untouched()


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "http 1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a tls hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "a preface that stops": b"PRI * HTTP/2.0\r\n",
    "a preface and frames of noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 16,
    "a frame of 16 MB": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_on_the_port_disturbs_nobody(world: World, server: Server, what: str) -> None:
    """Other clients are served while a connection sends garbage and after it is closed."""
    host, port = server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=TRY_S) as connection:
        connection.sendall(GARBAGE[what])
        world.assert_untouched()
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    world.assert_untouched()


# Streams


Pieces = Iterable[loss_pb2.StreamLossRequest]


def header(request: loss_pb2.ComputeLossRequest) -> loss_pb2.StreamLossRequest:
    return loss_pb2.StreamLossRequest(header=request)


def chunk(place: int, content: bytes) -> loss_pb2.StreamLossRequest:
    return loss_pb2.StreamLossRequest(chunk=tensor_pb2.Chunk(id=place, content=content))


def chunked(world: World, **changes: int) -> loss_pb2.ComputeLossRequest:
    """Return a valid request whose hidden is sent separately as chunk 0."""
    request = world.full()
    refer(request.hidden, 0, **changes)
    return request


def refer(tensor: tensor_pb2.Tensor, place: int, num_bytes: int | None = None) -> None:
    """Turn an inline tensor into a chunk reference."""
    length = len(tensor.inline) if num_bytes is None else num_bytes
    tensor.chunk.id, tensor.chunk.num_bytes = place, length


HIDDEN = numbers(N, D).tobytes()
HALF = len(HIDDEN) // 2


def hidden_chunks(place: int = 0) -> list[loss_pb2.StreamLossRequest]:
    return [chunk(place, HIDDEN[:HALF]), chunk(place, HIDDEN[HALF:])]


def of_shape(world: World, *sizes: int, num_bytes: int) -> loss_pb2.ComputeLossRequest:
    """Return a request that announces another shape of hidden."""
    request = chunked(world, num_bytes=num_bytes)
    del request.hidden.shape[:]
    request.hidden.shape.extend(sizes)
    return request


def twice_referred(world: World) -> loss_pb2.ComputeLossRequest:
    """Return a request whose hidden and labels refer to the same chunk."""
    request = chunked(world)
    refer(request.labels, 0)
    return request


@dataclass(frozen=True)
class Misuse:
    """An invalid sequence of stream messages, and the expected error class and field."""

    error: type[ShardlossError]
    field: str
    what: str
    pieces: Callable[[World], Pieces]

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


def misuses(error: type[ShardlossError], field: str, **pieces: Callable[[World], Pieces]) -> list[Misuse]:
    return [Misuse(error, field, what, make) for what, make in pieces.items()]


EMPTY = loss_pb2.StreamLossRequest()
MISUSES = [
    *misuses(
        InvalidArgument,
        "piece",
        nothing=lambda w: [],
        an_empty_piece_first=lambda w: [EMPTY],
        a_chunk_first=lambda w: [*hidden_chunks(), header(chunked(w))],
        two_headers=lambda w: [header(chunked(w)), header(chunked(w))],
        a_header_at_the_end=lambda w: [header(chunked(w)), *hidden_chunks(), header(w.full())],
        an_empty_piece_later=lambda w: [header(chunked(w)), EMPTY],
    ),
    *misuses(
        InvalidArgument,
        "chunk",
        a_chunk_that_was_not_announced=lambda w: [header(chunked(w)), chunk(1, b"x")],
        an_empty_chunk_that_was_not_announced=lambda w: [header(chunked(w)), chunk(7, b"")],
        an_empty_chunk=lambda w: [header(chunked(w)), chunk(0, b""), *hidden_chunks()],
        a_chunk_for_an_inline_tensor=lambda w: [header(w.full()), chunk(0, b"x")],
        a_byte_too_many=lambda w: [header(chunked(w)), *hidden_chunks(), chunk(0, b"x")],
        a_chunk_twice=lambda w: [header(chunked(w)), *hidden_chunks(), *hidden_chunks()],
        a_byte_too_few=lambda w: [header(chunked(w)), chunk(0, HIDDEN[:HALF]), chunk(0, HIDDEN[HALF:-1])],
        no_chunks=lambda w: [header(chunked(w))],
    ),
    *misuses(
        InvalidArgument,
        "hidden",
        more_announced_than_the_shape_takes=lambda w: [header(chunked(w, num_bytes=len(HIDDEN) + 4))],
        less_announced_than_the_shape_takes=lambda w: [header(chunked(w, num_bytes=4))],
        a_negative_number_of_bytes=lambda w: [header(chunked(w, num_bytes=-4))],
        a_negative_shape=lambda w: [header(of_shape(w, -N, -D, num_bytes=len(HIDDEN)))],
        a_shape_beyond_64_bits=lambda w: [header(of_shape(w, 2**62, 2**62, num_bytes=0))],
        no_number_in_hidden=lambda w: [header(chunked(w)), *not_numbers()],
    ),
    *misuses(
        InvalidArgument,
        "labels",
        one_chunk_for_two_tensors=lambda w: [header(twice_referred(w)), *hidden_chunks()],
    ),
    *misuses(
        LimitExceeded,
        "chunk",
        more_than_a_request_may_hold=lambda w: [header(of_shape(w, 205, D, num_bytes=4 * 205 * D))],
        terabytes=lambda w: [header(of_shape(w, 2**40, D, num_bytes=2**42 * D))],
        a_chunk_above_the_limit=lambda w: [header(chunked(w)), chunk(0, HIDDEN)],
    ),
    *misuses(NotSupported, "hidden", shared_memory=lambda w: [header(shared(w))]),
]


def shared(world: World) -> loss_pb2.ComputeLossRequest:
    request = world.full()
    request.hidden.shared_memory.name = "block"
    return request


def not_numbers() -> list[loss_pb2.StreamLossRequest]:
    """Return hidden as a chunk of the announced size, filled with NaN."""
    content = np.full(N * D, np.nan, np.float32).tobytes()
    return [chunk(0, content[:HALF]), chunk(0, content[HALF:])]


def test_a_stream_of_chunks_is_a_loss(world: World) -> None:
    """Chunks sent in order give bitwise the same loss as the inline request, so the unmodified stream is valid."""
    pieces = [header(chunked(world)), *hidden_chunks()]
    replies = list(world.client.losses.StreamLoss(iter(pieces), timeout=TRY_S))
    assert replies[0].header.loss.SerializeToString() == world.answer
    world.assert_untouched()


@pytest.mark.parametrize("misuse", MISUSES, ids=str)
def test_a_misused_stream_is_refused_by_name(world: World, misuse: Misuse) -> None:
    """The error has the class and field listed above, and the table is unchanged."""
    pieces = misuse.pieces(world)
    with pytest.raises(ShardlossError) as caught:
        once(lambda _, timeout: list(world.client.losses.StreamLoss(iter(pieces), timeout=timeout)), None)
    assert (type(caught.value), caught.value.field) == (misuse.error, misuse.field), caught.value
    world.assert_untouched()


class Stalled:
    """A request stream that sends its first pieces and then nothing until `let_go` is called."""

    def __init__(self, pieces: list[loss_pb2.StreamLossRequest]) -> None:
        self._pieces, self._go = pieces, threading.Event()

    def __iter__(self) -> Iterator[loss_pb2.StreamLossRequest]:
        yield from self._pieces
        self._go.wait(PATIENCE_S)

    def let_go(self) -> None:
        self._go.set()


@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
def test_a_stream_that_ends_midway_gives_its_place_back(world: World, server: Server, how: str) -> None:
    """A stream that is cancelled, disconnected or past its deadline releases its place and bytes; no ticket remains."""
    admission = server.handlers.stream_bytes
    request = chunked(world)
    request.session, request.step = "fresh", 1
    stalled = [Stalled([header(request), hidden_chunks()[0]]) for _ in range(5)]
    channel = grpc.insecure_channel(server.address)
    stub = loss_pb2_grpc.LossServiceStub(channel)
    timeout = 0.3 if how == "deadline" else None
    calls: list[Any] = [stub.StreamLoss(iter(one), timeout=timeout) for one in stalled]
    try:
        if how != "deadline":
            eventually(lambda: admission.num_calls == len(calls), "the streams")
            assert admission.num_bytes == len(calls) * len(HIDDEN)
        if how == "cancel":
            for call in calls:
                call.cancel()
        if how == "close":
            channel.close()
        eventually(lambda: all(call.done() for call in calls), "the end of the calls")
        eventually(lambda: admission.num_calls == 0, "the end of the streams")
        assert admission.num_bytes == 0
    finally:
        for one in stalled:
            one.let_go()
        channel.close()
    world.assert_untouched()


def test_a_cancelled_stream_is_no_bug_of_the_server(
    world: World, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """When a client cancels a stream, the server logs nothing at level ERROR."""
    stalled = Stalled([header(chunked(world)), hidden_chunks()[0]])
    call = world.client.losses.StreamLoss(iter(stalled))
    try:
        eventually(lambda: server.handlers.stream_bytes.num_calls == 1, "the stream")
        call.cancel()
        eventually(lambda: server.handlers.stream_bytes.num_calls == 0, "the end of the stream")
    finally:
        stalled.let_go()
    world.assert_untouched()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@contextlib.contextmanager
def small_server(stream_idle_s: float = 10.0) -> Iterator[tuple[Server, shardloss.LossClient]]:
    """Run a server with 8 threads and 4 places for calls, and connect a client."""
    limits = dataclasses.replace(
        LIMITS,
        max_calls_in_flight=4,
        max_num_classes=50_000,
        max_reply_bytes=1 << 24,
        max_table_bytes=1 << 24,
        stream_idle_s=stream_idle_s,
    )
    group = LocalGroup(1)
    server = Server(group, ServerConfig(Listening(port=0, admin_port=0, num_threads=NUM_THREADS), limits))
    server.start()
    try:
        with shardloss.connect(server.address) as client:
            yield server, client
    finally:
        server.stop(grace_s=0.0)
        group.close()


NUM_THREADS = 8


def assert_answers(client: shardloss.LossClient, world: World) -> None:
    """Assert that losses are answered or refused within 3 s, and that a commit is answered."""
    for _ in range(3):
        with contextlib.suppress(Overloaded):
            once(client.losses.ComputeLoss, world.full(), timeout_s=TRY_S)
    once(client.losses.Commit, world.commit(), timeout_s=TRY_S)


def test_streams_without_a_header_do_not_silence_the_server(fresh_name: Callable[[], str]) -> None:
    """Calls are answered or refused in time while more streams than threads are open and silent."""
    stalled = [Stalled([]) for _ in range(2 * NUM_THREADS)]
    with small_server() as (server, client), grpc.insecure_channel(server.address) as channel:
        world = World(server, client, fresh_name())
        calls = [loss_pb2_grpc.LossServiceStub(channel).StreamLoss(iter(one)) for one in stalled]
        try:
            assert_answers(client, world)
        finally:
            for one, call in zip(stalled, calls, strict=True):
                one.let_go()
                call.cancel()
        assert once(client.losses.ComputeLoss, world.full(), PATIENCE_S).loss.inline


def test_streams_that_read_no_reply_do_not_silence_the_server(fresh_name: Callable[[], str]) -> None:
    """Calls are answered or refused in time while many streams request megabytes and read nothing."""
    with small_server() as (server, client), grpc.insecure_channel(server.address) as channel:
        world = World(server, client, fresh_name())
        wide = client.create_table(f"{world.name}-wide", num_classes=50_000, dim=16, dtype="float64")
        request = loss_pb2.ComputeLossRequest(
            table=wide.name,
            hidden=wire.encode(numbers(1, 16)),
            labels=wire.encode(np.zeros(1, int)),
            full_softmax=loss_pb2.FullSoftmax(),
            want_table_grad=True,
        )
        stub = loss_pb2_grpc.LossServiceStub(channel)
        calls = [stub.StreamLoss(iter([header(request)])) for _ in range(8 * NUM_THREADS)]
        try:
            assert_answers(client, world)
        finally:
            for call in calls:
                call.cancel()
        assert once(client.losses.ComputeLoss, world.full(), PATIENCE_S).loss.inline


def test_a_stream_that_falls_silent_is_dropped_and_may_be_repeated(fresh_name: Callable[[], str]) -> None:
    """The server ends a stream that is silent for stream_idle_s with a transient error, so the client may retry."""
    with small_server(stream_idle_s=0.1) as (server, client):
        world = World(server, client, fresh_name())
        stalled = Stalled([header(chunked(world)), hidden_chunks()[0]])
        try:
            with pytest.raises(TransientError):
                once(lambda _, timeout: list(client.losses.StreamLoss(iter(stalled), timeout=timeout)), None)
        finally:
            stalled.let_go()
        world.assert_untouched()
