"""A call from start to end: its request id, its cost, its metrics and log lines, and the status of its error."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from shardloss.errors import Internal, LimitExceeded, Overloaded, ServiceError, ShardlossError
from shardloss.session import log_name
from shardloss.v1 import cost_pb2

from shardloss_server import logs, metrics
from shardloss_server.config import Limits, Watching
from shardloss_server.frontend.meter import METER, Meter, Phases
from shardloss_server.metrics import Metrics
from shardloss_server.rpc.calls import Calls
from shardloss_server.rpc.roles import needed_role
from shardloss_server.rpc.status import fail
from shardloss_server.tracing import CallSpan, Tracing

log = logging.getLogger("shardloss_server.calls")
REQUEST_ID_KEY = "x-request-id"
REQUEST_ID = re.compile(r"[!-~]{1,64}")
OK, CANCELLED = "OK", "CANCELLED"
UNKNOWN = "unknown"  # for methods that do not exist: callers can make up any number of names
PLACES = frozenset(
    {field.name for field in fields(Limits)} | {"backlog", "max_watchers", "num_threads", "unread_replies"}
)  # limits that a refusal may name
NO_MESSAGE = "the call ended without its message"  # the error of a unary call without a message
MAX_LINES_A_SECOND = 10  # per reason, so that an overload does not flood the log
MAX_TEXT = 512  # characters of a caller's text that are logged


class Sized(Protocol):
    """A message that knows its size."""

    def ByteSize(self) -> int:  # noqa: N802  (protobuf's name)
        """Return the size of the message on the wire, in bytes."""


S = TypeVar("S", bound=Sized)


class CallLog:
    """The log, metrics and traces of the calls of one server."""

    def __init__(self, counted: Metrics, watching: Watching, tracing: Tracing | None = None) -> None:
        self.metrics, self.watching, self.recent, self.tracing = counted, watching, Calls(), tracing
        self.paces: dict[str, Pace] = {}
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def refuse(self, path: str, context: grpc.ServicerContext, error: ShardlossError | grpc.RpcError) -> NoReturn:
        """End a call of a method ("/package.Service/Method") with an error; gRPC's own means that it has ended."""
        name = path.rpartition("/")[2] if needed_role(path) is not None else UNKNOWN
        with self.begin(name, context):
            raise error
        raise AssertionError("a failed call has ended")

    def refusing(self, path: str, error: ShardlossError) -> Any:
        """Return a handler for any method that ends the call with an error at once, without requesting its message."""

        def refuse(_messages: Iterator[Any], context: grpc.ServicerContext) -> NoReturn:
            self.refuse(path, context, error)

        return grpc.stream_unary_rpc_method_handler(refuse)

    def begin(self, method: str, context: grpc.ServicerContext, request: Any = None) -> Call:
        """Return a new call: the context manager around all work for it."""
        call = Call(self, method, context)
        if request is not None:
            call.about(request)
        return call

    def request_id(self, context: grpc.ServicerContext) -> str:
        """Return the caller's request id if it is a short printable text, or else a new one."""
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY and isinstance(value, str) and REQUEST_ID.fullmatch(value):
                return value
        return f"{self._prefix}-{next(self._numbers)}"


class Call:
    """One call, whose context manager turns an error of its body into the status of the call.

    A ShardlossError keeps its reason. Any other error becomes INTERNAL, and its trace is logged with the request id.
    """

    def __init__(self, call_log: CallLog, method: str, context: grpc.ServicerContext) -> None:
        self.method, self.request_id = method, call_log.request_id(context)
        self.meter = Meter()
        self.received_bytes = self.sent_bytes = 0
        self.table = self.session = ""
        self._log_of, self._context = call_log, context
        self._began = time.perf_counter()
        self._span: CallSpan | None = None

    def about(self, request: Any) -> None:
        """Note the call's request, or the header of its stream: its bytes, table and session."""
        self.received_bytes += request.ByteSize()
        message = getattr(request, "message", request)
        header = getattr(message, "header", message)
        named = getattr(header, "table", "") or getattr(getattr(header, "spec", None), "name", "")
        self.table = str(named).partition("#")[0]  # without the id of a reference
        self.session = str(getattr(header, "session", ""))

    def receiving(self, pieces: Iterable[S]) -> Iterator[S]:
        """Yield the messages of the call's stream and count their bytes; the first one names its table and session."""
        for place, piece in enumerate(pieces):
            if place:
                self.received_bytes += piece.ByteSize()
            else:
                self.about(piece)
            yield piece

    def sending(self, reply: Sized) -> Call:
        """Note the size of the call's reply; for a stream, of the header with all its content."""
        self.sent_bytes = reply.ByteSize()
        return self

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call got a thread."""
        return time.perf_counter() - self._began

    def cost(self, sent_bytes: int) -> cost_pb2.CallCost:
        """Return the cost of the call so far, with a reply of sent_bytes bytes."""
        spent = self.meter
        times = {f"{name}_us": round(1e6 * getattr(spent, f"{name}_s")) for name in TIMES}
        return cost_pb2.CallCost(
            total_us=round(1e6 * self.elapsed_s),
            received_bytes=self.received_bytes,
            sent_bytes=sent_bytes,
            flops=spent.flops,
            **times,
        )

    def describe(self) -> Mapping[str, object]:
        """Return the call's fields for log lines.

        They contain no token, no row, and only a digest of the session, since others could commit with its name.
        """
        said = {"request_id": self.request_id, "method": self.method}
        if self.table:
            said["table"] = printable(self.table)
        if self.session:
            said["session"] = log_name(self.session)
        if self._span is not None:
            said["trace_id"] = self._span.trace_id
        return said

    def __enter__(self) -> Call:
        """Set the context variables of this call; each gRPC call has its own context, so they are never reset."""
        if self._log_of.tracing is not None:
            self._span = self._log_of.tracing.begin(self.method, self._context.invocation_metadata() or (), self._began)
            self.meter.phases = None if self._span is None else Phases()
        METER.set(self.meter)
        logs.CALL.set(self.describe)
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self.request_id),))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ours = None if error is None else self._ours(error)
        self._note(OK if error is None else CANCELLED if ours is None else ours.reason, ours)
        if ours is not None:
            ours.details["request_id"] = self.request_id
            fail(self._context, ours, (REQUEST_ID_KEY, self.request_id))

    def _ours(self, error: BaseException) -> ShardlossError | None:
        """Return the error to send to the caller, or None if it has gone away."""
        if isinstance(error, ShardlossError):
            return error
        if isinstance(error, MemoryError):
            return LimitExceeded("the server does not have enough memory for this call")
        if isinstance(error, Exception) and self._context.is_active():
            log.exception("call failed inside", exc_info=error)
            return Internal(f"internal error; the server's log has the details of request {self.request_id}")
        return None

    def _note(self, reason: str, error: ShardlossError | None) -> None:
        if error is not None and not self._context.is_active() and reason in GIVEN_UP:
            left_s = self._context.time_remaining()
            reason = CANCELLED if left_s is None or left_s > 0 else reason
        self._count(reason, error)
        self._trace(reason, error)
        watching, duration_s = self._log_of.watching, self.elapsed_s
        if reason != OK:
            self._log(level_of(error), "call failed", reason, duration_s, error)
        elif duration_s > watching.slow_call_s:
            self._log(logging.WARNING, "slow call", reason, duration_s)
        elif watching.log_calls:
            self._log(logging.INFO, "call", reason, duration_s)

    def _count(self, reason: str, error: ShardlossError | None) -> None:
        count, observe, method, spent = (
            self._log_of.metrics.count,
            self._log_of.metrics.observe,
            self.method,
            self.meter,
        )
        self._log_of.recent.note(method, self.elapsed_s, None if reason == OK else reason)
        count(metrics.CALLS, method, reason)
        observe(metrics.CALL_SECONDS, self.elapsed_s, method)
        count(metrics.RECEIVED_BYTES, method, by=self.received_bytes)
        count(metrics.SENT_BYTES, method, by=self.sent_bytes)
        if isinstance(error, Overloaded):
            limit = error.details.get("limit", "")
            count(metrics.REFUSALS, limit if limit in PLACES else "other")
        if spent.fanout_s:
            observe(metrics.KERNEL_SECONDS, spent.kernel_s, method)
            count(metrics.FLOPS, method, by=spent.flops)
            if spent.finish_s:  # only losses have a finish phase
                for phase, seconds in (
                    ("wait", spent.wait_s),
                    ("plan", spent.plan_s),
                    ("fanout", spent.fanout_s),
                    ("finish", spent.finish_s),
                ):
                    observe(metrics.PHASE_SECONDS, seconds, phase)

    def _trace(self, reason: str, error: ShardlossError | None) -> None:
        if self._span is None or self.meter.phases is None:
            return
        said: dict[str, str | int] = {
            "shardloss.reason": reason,
            "shardloss.request_id": self.request_id,
            "shardloss.received_bytes": self.received_bytes,
            "shardloss.sent_bytes": self.sent_bytes,
            "shardloss.flops": self.meter.flops,
        }
        if self.table:
            said["shardloss.table"] = printable(self.table)
        if self.session:
            said["shardloss.session"] = log_name(self.session)
        self._span.end(said, self.meter.phases, is_fault=isinstance(error, ServiceError))

    def _log(self, level: int, event: str, reason: str, duration_s: float, error: ShardlossError | None = None) -> None:
        if not log.isEnabledFor(level):
            return
        pace = self._log_of.paces.setdefault(reason, Pace())
        left_out = 0 if self._log_of.watching.log_calls else pace.left_out(time.monotonic())
        if left_out is None:
            return
        said: dict[str, object] = {
            "reason": reason,
            "duration_ms": round(1e3 * duration_s, 3),
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "peer": self._context.peer(),
        }
        if error is not None:
            said["error"] = printable(error.message)
        if left_out:
            said["left_out"] = left_out
        log.log(level, event, extra=said)


TIMES = ("wait", "plan", "fanout", "kernel", "finish")
GIVEN_UP = ("DEADLINE_EXCEEDED",)  # also the reason of a wait whose caller has gone away


class Pace:
    """A limiter of log lines to MAX_LINES_A_SECOND per second. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._second, self._num_lines, self._num_left_out = -1.0, 0, 0

    def left_out(self, now: float) -> int | None:
        """Return how many lines were left out since the last one, or None if this one must be left out, too."""
        with self._lock:
            if now - self._second >= 1.0:
                self._second, self._num_lines = now, 0
            if self._num_lines >= MAX_LINES_A_SECOND:
                self._num_left_out += 1
                return None
            self._num_lines += 1
            left_out, self._num_left_out = self._num_left_out, 0
            return left_out


def level_of(error: ShardlossError | None) -> int:
    """Return the log level: ERROR if an operator must act, WARNING for a refusal, INFO if the caller is the cause."""
    if isinstance(error, ServiceError):
        return logging.ERROR
    return logging.WARNING if isinstance(error, Overloaded) else logging.INFO


def printable(text: str) -> str:
    """Return a caller's text for one log line: at most MAX_TEXT characters, with unprintable ones as "?"."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])
