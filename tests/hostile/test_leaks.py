"""Error messages sent to a client never contain a path, a memory address or a line of code."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
import shardloss
from google.protobuf.descriptor import MethodDescriptor
from shardloss.channel import DETAILS_KEY
from shardloss_server import logs
from shardloss_server.cluster.group import Pending, ShardMissing, WorkerLost
from shardloss_server.cluster.local import LocalGroup, LocalPending
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import Server

from .credentials import all_methods
from .test_raw_bytes import METHODS, RAW_LIMITS, call_raw, valid_messages
from .world import World

LEAK = re.compile(
    r"0x[0-9a-f]{4,}|Traceback|File \"|\.py\b|\bline \d+|object at|/(home|tmp|usr|work|root|proc|srv|secret)\b|Errno"
)
SECRET = "/secret/place/shard.py"
FAILURES: dict[str, Callable[[], Exception]] = {
    "a file's": lambda: OSError(13, "Permission denied", SECRET),
    "an object's": lambda: RuntimeError(f'{object()!r} in File "{SECRET}", line 7'),
    "a lost worker's": lambda: WorkerLost(f'Traceback (most recent call last): File "{SECRET}", line 3'),
    "a missing shard's": lambda: ShardMissing(f"{object()!r}"),
    "a bug's": lambda: AssertionError(SECRET),
}


def assert_no_leak(*texts: str) -> None:
    for text in texts:
        assert not LEAK.search(text), text


def test_what_would_be_a_leak_is_seen() -> None:
    """The pattern finds the leak in each of these failures, and none in ordinary error messages."""
    for make in FAILURES.values():
        with pytest.raises(AssertionError):
            assert_no_leak(str(make()))
    assert_no_leak("labels[17, 0] = 50257 is outside [0, 50257): ids are zero-based", "table 'a/b'")


class FailingGroup(LocalGroup):
    """A group on which every verb fails with `failure` once it is set."""

    failure: Callable[[], Exception] | None = None

    def start(self, worker: int, method: str, *args: Any) -> Pending[dict[int, Any]]:
        if self.failure is None:
            return super().start(worker, method, *args)
        failed: Future[dict[int, Any]] = Future()
        failed.set_exception(self.failure())
        return LocalPending(failed)


@pytest.fixture
def server() -> Iterator[Server]:
    group = FailingGroup(2)
    server = Server(group, ServerConfig(limits=RAW_LIMITS))
    server.start()
    yield server
    group.failure = None
    server.stop(grace_s=0.5)
    group.close()


def all_of(failure: grpc.RpcError) -> list[str]:
    """Return all texts of a failed call: its details and trailing metadata."""
    metadata = failure.trailing_metadata() or ()
    return [
        failure.details() or "",
        *(value.decode("latin-1") if isinstance(value, bytes) else value for _, value in metadata),
    ]


def refused(channel: grpc.Channel, world: World, method: MethodDescriptor) -> list[grpc.RpcError]:
    """Send the valid requests of a method and return the errors of those that fail."""
    ends = []
    for request in valid_messages(world).get(method.name, []):
        try:
            call_raw(channel, method, [request.SerializeToString()])
        except grpc.RpcError as failure:
            ends.append(failure)
    return ends


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failing_worker_leaks_nothing(server: Server, failure: Callable[[], Exception]) -> None:
    """No RPC leaks anything, no matter which exception the worker raised."""
    with shardloss.connect(server.address) as client, grpc.insecure_channel(server.address) as channel:
        world = World(server, client, "words")
        server.catalog.group.failure = failure  # type: ignore[attr-defined]
        ends = {method.name: refused(channel, world, method) for method in METHODS}
        assert_no_leak(*(text for found in ends.values() for end in found for text in all_of(end)))
        assert ends["ComputeLoss"]
        assert ends["Evaluate"]
        assert ends["ReadRows"]


def test_a_bug_is_internal_with_a_request_id_and_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every RPC reports a bug as INTERNAL with a request id; the details are in the server's log under that id."""
    logged: set[object] = set()

    def note(_: logging.LogRecord) -> bool:
        describe = logs.CALL.get()
        logged.add(describe()["request_id"] if describe else None)
        return True

    monkeypatch.setattr(caplog.handler, "filters", [note])

    def bug(*_: object, **__: object) -> object:
        raise FAILURES["an object's"]()

    with shardloss.connect(server.address) as client, grpc.insecure_channel(server.address) as channel:
        world = World(server, client, "words")
        for name in ("owner", "owners", "find", "create", "delete", "rename"):
            if hasattr(server.catalog, name):
                monkeypatch.setattr(server.catalog, name, bug)
        for method in all_methods():
            if method.name == "GetServerInfo" or method not in METHODS:
                continue
            ends = refused(channel, world, method)
            assert ends, method.name
            for end in ends:
                assert_no_leak(*all_of(end))
                assert DETAILS_KEY in dict(end.trailing_metadata() or ())
                if end.code() is grpc.StatusCode.INTERNAL:
                    request_id = re.findall(r"details of request (\S+)$", end.details() or "")
                    assert request_id
                    assert request_id[-1] in logged
        monkeypatch.undo()
    assert SECRET in caplog.text
