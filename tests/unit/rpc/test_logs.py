"""The server's log of its calls, in which a call is found by its request id."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import shardloss
from shardloss.v1 import loss_pb2_grpc, server_pb2, server_pb2_grpc
from shardloss_server import logs
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import ServerConfig, Watching
from shardloss_server.rpc.call import MAX_LINES_A_SECOND, Pace
from shardloss_server.rpc.serve import Server

V, D, N = 11, 5, 7
RID = "x-request-id"


class Logged:
    """A server whose log the test reads."""

    def __init__(self, log_format: Any = "json", **watching: Any) -> None:
        self.stream = io.StringIO()
        root = logging.getLogger()
        self._before = root.handlers[:], root.level
        root.handlers = [logging.StreamHandler(self.stream)]
        root.handlers[0].setFormatter(logs.formatter(log_format))
        root.setLevel("INFO")
        self.group = LocalGroup(1)
        self.server = Server(self.group, ServerConfig(watching=Watching(**watching)))
        self.server.start()
        self.client = shardloss.connect(self.server.address, timeout_s=20.0)
        self.table = self.client.create_table("words", num_classes=V, dim=D)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def of(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["message"] == message]

    def close(self) -> None:
        self.client.close()
        self.server.stop(grace_s=1.0)
        self.group.close()
        root = logging.getLogger()
        root.handlers, level = self._before[0], self._before[1]
        root.setLevel(level)


@pytest.fixture
def make() -> Iterator[Callable[..., Logged]]:
    made: list[Logged] = []

    def logged(*args: Any, **watching: Any) -> Logged:
        made.append(Logged(*args, **watching))
        return made[-1]

    yield logged
    for each in reversed(made):
        each.close()


def wrong(table: shardloss.Table) -> shardloss.ShardlossError:
    """Make a call of a session that fails, and return its error."""
    with pytest.raises(shardloss.errors.InvalidArgument) as caught:
        table.session().compute_loss(np.ones((1, D + 1), np.float32), np.zeros(1, np.int64), shardloss.FullSoftmax())
    return caught.value


def test_a_failed_call_has_one_line_that_its_error_names(make: Callable[..., Logged]) -> None:
    logged = make()
    error = wrong(logged.table)
    (line,) = logged.of("call failed")
    assert line["request_id"] == error.details["request_id"]
    assert (line["method"], line["table"], line["reason"]) == ("ComputeLoss", "words", "INVALID_ARGUMENT")
    assert (line["level"], line["logger"]) == ("info", "shardloss_server.calls")
    assert line["duration_ms"] > 0
    assert line["received_bytes"] > 4 * D
    assert line["peer"].startswith("ipv4:127.0.0.1")
    assert "hidden" in line["error"]
    assert line["time"].endswith("Z")


def test_calls_that_go_well_have_no_line_unless_asked_for(make: Callable[..., Logged]) -> None:
    logged = make()
    logged.client.list_tables()
    assert logged.of("call") == []
    talkative = make(log_calls=True)
    talkative.client.list_tables()
    assert "ListTables" in [line["method"] for line in talkative.of("call")]


def test_a_slow_call_has_a_line(make: Callable[..., Logged]) -> None:
    logged = make(slow_call_s=0.0)
    logged.client.list_tables()
    assert [line["level"] for line in logged.of("slow call") if line["method"] == "ListTables"] == ["warning"]


def test_neither_the_session_nor_what_a_caller_sends_is_in_the_log(make: Callable[..., Logged]) -> None:
    """The log has no session name, because others could use it to commit the session's steps."""
    logged = make(log_calls=True)
    session = logged.table.session()
    hidden = np.full((N, D), 0.123456789, np.float32)
    session.compute_loss(hidden, np.arange(N), shardloss.FullSoftmax())
    session.abort()
    text = logged.stream.getvalue()
    assert session.name not in text
    assert "0.1234" not in text
    said = {line["session"] for line in logged.of("call") if "session" in line}
    assert len(said) == 1  # the same for the loss and the abort


def test_what_a_caller_writes_stays_on_one_line(make: Callable[..., Logged]) -> None:
    """A caller cannot forge lines of the log."""
    logged = make("text")
    with pytest.raises(shardloss.errors.TableNotFound):
        logged.client.table("x\nlevel=error forged")
    assert not any(line.startswith("level=error") for line in logged.stream.getvalue().splitlines())


def test_lines_of_the_same_call_by_others_carry_its_name(
    make: Callable[..., Logged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that the front end logs during a call have the call's request id."""
    logged = make()
    pipeline = logged.server.handlers.pipeline

    def broken(*_: object) -> None:
        logging.getLogger("shardloss_server.frontend.owner").warning("on the %s", "way")
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "abort", broken)
    session = logged.table.session()
    session.compute_loss(np.ones((N, D), np.float32), np.arange(N), shardloss.FullSoftmax())
    with pytest.raises(shardloss.errors.Internal) as caught:
        session.abort()
    request_id = caught.value.details["request_id"]
    assert request_id in str(caught.value)
    inside, failed, way = (logged.of(message)[0] for message in ("call failed inside", "call failed", "on the way"))
    assert {line["request_id"] for line in (inside, failed, way)} == {request_id}
    assert "a bug" in inside["exception"]
    assert failed["level"] == "error"


@pytest.mark.parametrize("given, kept", [("trainer-7.42", True), ("a b", False), ("x" * 65, False), ("", False)])
def test_a_callers_name_is_kept_where_it_is_short_and_printable(
    make: Callable[..., Logged], given: str, kept: bool
) -> None:
    """The trailing metadata has the caller's request id, or a generated one of the same kind."""
    logged = make()
    with grpc.insecure_channel(logged.server.address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        request = server_pb2.GetServerInfoRequest()
        _, call = stub.GetServerInfo.with_call(request, metadata=((RID, given),), timeout=60)
    returned = dict(call.trailing_metadata())[RID]
    assert (returned == given) == kept
    assert 0 < len(returned) <= 64


def test_a_stream_and_a_refusal_before_any_handler_are_named(make: Callable[..., Logged]) -> None:
    """Both are logged with their request id, even if invalid bytes end the call before its method runs."""
    logged = make()
    with grpc.insecure_channel(logged.server.address) as channel:
        call = channel.unary_unary("/shardloss.v1.LossService/Commit")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", metadata=((RID, "raw-1"),), timeout=60)
        assert dict(caught.value.trailing_metadata())[RID] == "raw-1"
        with pytest.raises(grpc.RpcError):
            list(loss_pb2_grpc.LossServiceStub(channel).StreamLoss(iter(()), metadata=((RID, "s-1"),), timeout=60))
    assert {(line["method"], line["request_id"]) for line in logged.of("call failed")} == {
        ("Commit", "raw-1"),
        ("StreamLoss", "s-1"),
    }


def test_errors_of_the_client_itself_are_named_too(make: Callable[..., Logged]) -> None:
    """If the server is gone, the error of a call still has a request id, and names the server."""
    logged = make()
    logged.server.stop(grace_s=0.0)
    logged.client.channel.timeout_s = 0.2
    with pytest.raises(shardloss.errors.TransientError) as caught:
        logged.client.list_tables()
    assert caught.value.details["request_id"]
    assert f"the server at {logged.server.address} " in str(caught.value)


def test_all_tries_of_a_call_have_one_name_and_no_two_calls_the_same(make: Callable[..., Logged]) -> None:
    logged = make()
    first, second = (wrong(logged.table).details["request_id"] for _ in range(2))
    assert first != second
    assert first.split("-")[0] == second.split("-")[0]  # both calls use one connection


def test_an_overload_does_not_drown_in_its_own_log() -> None:
    """The number of lines per second is limited, and the next line reports how many are missing."""
    pace = Pace()
    said = [pace.left_out(100.0) for _ in range(MAX_LINES_A_SECOND + 7)]
    assert said == [0] * MAX_LINES_A_SECOND + [None] * 7
    assert pace.left_out(101.5) == 7
    assert pace.left_out(101.5) == 0


def test_what_ray_puts_on_every_record_is_not_in_a_line(make: Callable[..., Logged]) -> None:
    logged = make()
    logging.getLogger("shardloss_server").info("mine", extra={"_ray_whatever": 1, "worker": 2})
    (line,) = logged.of("mine")
    assert line["worker"] == 2
    assert not any(name.startswith("_ray") for name in line)


def test_text_has_the_same_as_json(make: Callable[..., Logged]) -> None:
    logged = make("text")
    error = wrong(logged.table)
    (line,) = [line for line in logged.stream.getvalue().splitlines() if "call failed" in line]
    assert f"request_id={error.details['request_id']}" in line
    assert "reason=INVALID_ARGUMENT" in line
