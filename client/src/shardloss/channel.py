"""The interface to gRPC: options, deadlines and retries; grpc.RpcError never leaves this module."""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from shardloss import errors
from shardloss.address import checked, is_direct, proxy_of
from shardloss.bearing import Bearing
from shardloss.credentials import Bearer, Credentials
from shardloss.errors import (
    BadReply,
    ClientClosed,
    DeadlineExceeded,
    LimitExceeded,
    NotSupported,
    Overloaded,
    ServerUnavailable,
    ShardlossError,
    TransientError,
    Unauthenticated,
)
from shardloss.reach import SLOW, why
from shardloss.splice import Splice, Spliced
from shardloss.tracing import UNTRACED, Naming, Tracing

DETAILS_KEY = "grpc-status-details-bin"
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0
MESSAGE_BYTES = 64 * 2**20  # the client accepts messages up to this size; the server's limits are lower

OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.ping_timeout_ms", 10000),  # the timeout that takes effect; the default is 60 s
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
REQUEST_ID_KEY = "x-request-id"  # identifies a call in the server's log and errors
# gRPC reports a reply of HTTP only in its text, whichever status code it makes of it
HTTP_STATUS = re.compile(r"http2 header with status: (\d+)")

Q = TypeVar("Q")
R = TypeVar("R")
Named: TypeAlias = dict[str, tuple[tuple[str, str], ...]]  # keyword arguments of a stub's call other than timeout
Attempt: TypeAlias = Callable[[float, Named], R]


def error_of(failure: grpc.RpcError, server: str = "the server") -> ShardlossError:
    """Return the error for a failed call to `server`, which names it in messages.

    The error is chosen by the reason in the status details. Without one, something other than the server made the
    status: a proxy's is chosen by the HTTP status, and gRPC's own by its status code.
    """
    code = failure.code().name
    message = failure.details() or code
    metadata: Any = failure.trailing_metadata() or ()
    for key, value in metadata:
        info = error_info(value) if key == DETAILS_KEY else None
        if info is not None:
            return errors.from_reason(info.reason, code, message, dict(info.metadata))
    status = HTTP_STATUS.search(message)
    if status is not None:
        return errors.from_http(int(status[1]), server)
    return errors.from_reason(None, code, errors.explained(code, message, server), {})


def error_info(details: bytes) -> error_details_pb2.ErrorInfo | None:
    """Return the ErrorInfo with the domain "shardloss" in serialized status details, or None."""
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        return None
    for packed in status.details:
        info = error_details_pb2.ErrorInfo()
        if packed.Is(info.DESCRIPTOR) and packed.Unpack(info) and info.domain == errors.DOMAIN:
            return info
    return None


def opened(address: str, credentials: Credentials) -> grpc.Channel:
    """Return a gRPC channel to address, encrypted if the credentials require it."""
    # A proxy from the environment could read data that is meant to stay on this machine.
    options = (*OPTIONS, ("grpc.enable_http_proxy", 0)) if is_direct(address) else OPTIONS
    if not credentials.is_tls:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*credentials.certificates()), options=options)


def matures(ready: grpc.Future[Any], limit_s: float) -> bool:
    """Wait for a future, and return True if it has a result within limit_s."""
    try:
        ready.result(limit_s)
    except grpc.FutureTimeoutError:
        return False
    return True


class Channel:
    """A gRPC channel that gives each call an overall deadline and retries transient errors with the same request.

    timeout_s limits a call with all its tries. attempt_timeout_s limits the first try, so that a lost reply is
    requested again; each later try may take twice as long as the one before, so that slow work can finish.
    """

    def __init__(
        self, address: str, timeout_s: float, attempt_timeout_s: float, credentials: Credentials | None = None
    ) -> None:
        credentials = credentials or Credentials()
        credentials.check(checked(address))
        self._address, self._credentials = address, credentials
        proxy = proxy_of(address)
        self._server = f"the server at {address}" + (f" (through the proxy {proxy[1]} of {proxy[0]})" if proxy else "")
        self.timeout_s, self.attempt_timeout_s = timeout_s, attempt_timeout_s
        self._bearer = Bearer(credentials)
        self._grpc = opened(address, credentials)
        self._bearing: Any = Bearing(self._grpc, self._bearer) if self._bearer.metadata() else self._grpc
        self._tracing = Tracing.found()
        if self._tracing is not None:
            self._bearing = Naming(self._bearing)
        self._id, self._calls, self._process = secrets.token_hex(6), count(1), os.getpid()
        self._closed = False
        self._away_s = float("inf")  # how long a server that is unavailable is called again
        self.max_message_bytes = MESSAGE_BYTES  # replaced by the server's limit once that is known

    @contextmanager
    def connecting(self, wait_s: float) -> Iterator[None]:
        """Connect, and let calls in the body wait for a server that is unavailable for no longer than wait_s.

        A gRPC server that is there but slow is waited for as long as a call may take.

        Raises:
            ServerUnavailable: there is no connection within wait_s; the message says what is at the address instead.
        """
        ready = grpc.channel_ready_future(self._grpc)
        try:
            if not matures(ready, wait_s):
                found = why(self._address, self._credentials)
                if found != SLOW or not matures(ready, self.timeout_s - wait_s):
                    message = f"no connection to {self._address} within {wait_s:g} s (wait_s, --wait-s): {found}"
                    raise ServerUnavailable(message)
        finally:
            ready.cancel()
        self._away_s = wait_s
        yield
        self._away_s = float("inf")

    def stub(self, make: Callable[[grpc.Channel], R]) -> R:
        """Return a stub of a service on this channel."""
        return make(self._bearing)

    def spliced(self, method: MethodDescriptor, request: Splice[Any], reply: Splice[Any]) -> Callable[..., Any]:
        """Return a callable that sends and receives `Spliced` messages, or streams of them for a streaming method."""
        kind = self._bearing.stream_stream if method.client_streaming else self._bearing.unary_unary
        name = f"/{method.containing_service.full_name}/{method.name}"
        made: Callable[..., Any] = kind(name, request_serializer=request.join, response_deserializer=reply.split)
        return made

    def close(self) -> None:
        """Close the connection; later calls raise ClientClosed. Idempotent."""
        self._closed = True
        if os.getpid() == self._process:
            self._grpc.close()

    def unary(
        self,
        method: Callable[..., R],
        request: Message | Spliced[Any],
        timeout_s: float | None,
        *,
        whole: bool = False,
        repeatable: bool = True,
    ) -> R:
        """Call method until it succeeds, fails permanently or runs out of time; whole lets one try use all the time.

        If the server refuses the token and the token file now contains another one, the call is repeated with the new
        token. A call that is not repeatable is retried only if the server refused it immediately as OVERLOADED.

        Raises:
            LimitExceeded: the request is larger than max_message_bytes and is not sent.
        """
        num_bytes = request.ByteSize()
        if num_bytes > self.max_message_bytes:
            message = f"the request of {num_bytes} bytes exceeds max_message_bytes = {self.max_message_bytes}; split it"
            raise LimitExceeded(message)
        attempt: Attempt[R] = lambda left, named: method(request, timeout=left, **named)  # noqa: E731
        return self._repeat(method, attempt, timeout_s, whole, repeatable)

    def stream(
        self, method: Callable[..., Iterable[R]], requests: Callable[[], Iterator[Q]], timeout_s: float | None
    ) -> list[R]:
        """Call a bidirectional stream, with the retries of `unary`; return its replies. Each try calls requests()."""
        attempt: Attempt[list[R]] = lambda left, named: list(method(requests(), timeout=left, **named))  # noqa: E731
        return self._repeat(method, attempt, timeout_s, True, True)

    def _repeat(
        self, method: Callable[..., object], attempt: Attempt[R], timeout_s: float | None, whole: bool, repeatable: bool
    ) -> R:
        """Run all tries of a call with one request id, which is added to its error, and one span if it is traced."""
        if os.getpid() != self._process:  # gRPC does not survive a fork: the call would hang
            raise NotSupported(
                f"this client was connected in process {self._process}, of which this one is a fork: call "
                "shardloss.connect in each process (a DataLoader: in its worker_init_fn)"
            )
        request_id = f"{self._id}-{next(self._calls)}"
        span = UNTRACED if self._tracing is None else self._tracing.call(getattr(method, "path", ""), request_id)
        named: Named = {"metadata": ((REQUEST_ID_KEY, request_id), *span.headers)}
        try:
            with span:
                return self._tried(span.counting(attempt), named, timeout_s, whole, repeatable)
        except ShardlossError as error:
            error.details.setdefault("request_id", request_id)
            raise

    def _tried(self, attempt: Attempt[R], named: Named, timeout_s: float | None, whole: bool, repeatable: bool) -> R:
        began = time.monotonic()
        deadline = began + (self.timeout_s if timeout_s is None else timeout_s)
        attempt_s = float("inf") if whole else self.attempt_timeout_s
        backoff_s, last, is_renewed = FIRST_BACKOFF_S, None, False
        while True:
            if self._closed:
                raise ClientClosed("the client was closed; connect again")
            left = deadline - time.monotonic()
            if left <= 0:
                raise last or DeadlineExceeded("the deadline passed before the call was sent")
            shown = self._bearer.metadata()
            try:
                return attempt(min(left, attempt_s), named)
            except grpc.RpcError as failure:
                last = error_of(failure, self._server)
            except ValueError:  # raised by gRPC if another thread has closed the channel
                if not self._closed:
                    raise
                continue
            if isinstance(last, Unauthenticated) and not is_renewed:
                self._bearer.renew()
                is_renewed = self._bearer.metadata() != shown  # by this call or by a concurrent one
                if is_renewed:
                    continue
            if not isinstance(last, TransientError if repeatable else Overloaded):
                raise last
            wait_s = max(last.retry_after_s, backoff_s * random.uniform(0.5, 1.0))
            end = min(deadline, began + self._away_s) if isinstance(last, ServerUnavailable) else deadline
            if time.monotonic() + wait_s >= end:
                raise last
            time.sleep(wait_s)
            backoff_s, attempt_s = min(2 * backoff_s, MAX_BACKOFF_S), 2 * attempt_s


def single(replies: list[Spliced[Any]], kind: str) -> Any:
    """Return the header at the start of a reply stream.

    Raises:
        BadReply: the stream is empty or starts with a different kind of message.
    """
    if not replies or replies[0].message.WhichOneof("piece") != kind:
        raise BadReply("the reply stream does not begin with a header")
    return replies[0].message.header
