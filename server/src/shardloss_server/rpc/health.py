"""gRPC's health service, in which a watcher that does not read delays neither other clients nor a shutdown.

The servicer of grpc_health does not ensure this: it sends while it holds the lock of all its answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shardloss.errors import Overloaded

from shardloss_server.frontend.admission import LiveStream, LiveStreams
from shardloss_server.rpc.call import CallLog
from shardloss_server.rpc.caller import caller_of

MAX_WATCHERS = 256  # watching needs no credentials, and each watcher costs memory
WATCH = "/grpc.health.v1.Health/Watch"
Send = Callable[[health_pb2.HealthCheckResponse | None], None]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """The servicer of the health service; all services have the same status. Thread-safe.

    `watching` holds the places of watchers: a watcher that does not read a message within longest_s is dropped.
    """

    def __init__(self, services: tuple[str, ...], longest_s: float, call_log: CallLog) -> None:
        self._services, self._call_log = frozenset(("", *services)), call_log
        self.watching = LiveStreams(MAX_WATCHERS, longest_s, "max_watchers")
        self._watchers: dict[Watcher, None] = {}
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._is_over = False

    def serve(self) -> None:
        """Report SERVING from now on."""
        self._status = health_pb2.HealthCheckResponse.SERVING
        self._tell_all()

    def stop(self) -> None:
        """Report NOT_SERVING from now on, for good; watchers receive it, and then their calls end."""
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._is_over = True
        self._tell_all()

    def _tell_all(self) -> None:
        for watcher in list(self._watchers):  # each thread waits for one client
            threading.Thread(target=self._tell, args=(watcher,), daemon=True).start()

    def Check(  # noqa: N802  (the service's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the status of one service, or NOT_FOUND if there is none of that name."""
        if request.service not in self._services:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=self._status)

    def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send: Send
    ) -> None:
        """Send the status of one service, now and whenever it changes; between two messages no thread is held."""
        with ExitStack() as until_end:
            try:
                stream = until_end.enter_context(self.watching.stream(context.cancel, caller_of(context)))
            except Overloaded as error:
                self._call_log.refuse(WATCH, context, error)
            watcher = Watcher(request.service, send, stream)
            self._watchers[watcher] = None
            until_end.callback(self._watchers.pop, watcher, None)
            end = until_end.pop_all().close
        if context.add_callback(end):
            self._tell(watcher)
        else:
            end()

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]  # makes gRPC pass `send`

    def _tell(self, watcher: Watcher) -> None:
        with watcher.sending:
            is_over = self._is_over  # read before the status, which was set before it
            unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            watcher.send(self._status if watcher.service in self._services else unknown)
            if is_over:
                watcher.end()


class Watcher:
    """One Watch call, to which `Health` sends statuses; the lock `sending` is held for each one."""

    def __init__(self, service: str, send: Send, stream: LiveStream) -> None:
        self.service, self.sending = service, threading.Lock()
        self._send, self._stream = send, stream
        self._told, self._has_ended = -1, False
        stream.working()

    def send(self, status: int) -> None:
        """Send a status if it has changed, and wait until the client reads it or is dropped."""
        if status != self._told:
            self._told = status
            self._stream.moved()
            self._send(health_pb2.HealthCheckResponse(status=status))
            self._stream.working()

    def end(self) -> None:
        """End the call. Idempotent."""
        if not self._has_ended:
            self._has_ended = True
            self._send(None)
