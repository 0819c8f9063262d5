"""The gate, which counts each call before it takes a thread, and watches it while its message arrives.

gRPC gives a unary call a thread, which waits for the message as long as the client likes. Every unary method is
therefore served as a stream of one message, which is the same on the wire: its handler starts before the message has
arrived, counts the call under its caller, and registers the call so that it can be dropped.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from shardloss.errors import InvalidArgument, Overloaded, ServerUnavailable, ShardlossError

from shardloss_server.frontend.admission import LiveStreams
from shardloss_server.frontend.hints import Hints
from shardloss_server.rpc.call import NO_MESSAGE, CallLog
from shardloss_server.rpc.caller import caller_of
from shardloss_server.rpc.splicing import SERVICE

DRAINING_RETRY_S = 1.0
WATCHES_ITSELF = f"/{SERVICE}/StreamLoss"  # `Handlers.streams` watches it from its first piece to its last
Answer = Callable[..., Any]
Context = grpc.ServicerContext


class Gate(grpc.ServerInterceptor):
    """An interceptor that lets at most max_inside calls hold a thread, from first byte to end of handler. Thread-safe.

    `arriving` holds the places of calls whose message is still arriving.
    """

    def __init__(self, max_inside: int, arriving: LiveStreams, call_log: CallLog) -> None:
        self._max_inside, self.arriving, self._call_log = max_inside, arriving, call_log
        self._hints = Hints()
        self._lock = threading.Lock()
        self._is_draining = False
        self.num_inside = 0
        self.num_refused = 0

    def drain(self) -> None:
        """Refuse every new call as SERVER_UNAVAILABLE from now on."""
        self._is_draining = True

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Return the method's handler behind the gate, or one that refuses the call without waiting for its message."""
        handler, path = continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None
        with self._lock:
            error = self._refusal()
            self.num_refused += error is not None
            self.num_inside += error is None
        return self._behind(handler, path) if error is None else self._call_log.refusing(path, error)

    def _refusal(self) -> ShardlossError | None:
        if self._is_draining:
            return ServerUnavailable("the server is shutting down", retry_after_s=DRAINING_RETRY_S)
        if self.num_inside >= self._max_inside:
            return Overloaded(
                f"{self.num_inside} calls are under way; repeat later",
                retry_after_s=self._hints.next(),
                limit="num_threads",
            )
        return None

    def _behind(self, handler: Any, path: str) -> Any:
        """Return a handler of the same method, with its requests as a stream behind the gate."""
        read, write = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._of_one(handler.unary_unary, path), read, write)
        if handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(self._of_one(handler.unary_stream, path), read, write)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._of_stream(handler.stream_unary, path), read, write)
        answer = self._both_ways(handler.stream_stream, path)
        return grpc.stream_stream_rpc_method_handler(answer, read, write)

    def _of_one(self, answer: Answer, path: str) -> Answer:
        @functools.wraps(answer)  # also copies attributes that gRPC reads, such as experimental_non_blocking
        def handler(requests: Iterator[Any], context: Context, *send: Any) -> Any:
            try:
                request = self._next(requests, context, path)
                if request is None:
                    self._call_log.refuse(path, context, InvalidArgument(NO_MESSAGE))
                return answer(request, context, *send)
            finally:
                self._leave()

        return handler

    def _of_stream(self, answer: Answer, path: str) -> Answer:
        def handler(requests: Iterator[Any], context: Context) -> Any:
            try:
                return answer(self._watched(requests, context, path), context)
            finally:
                self._leave()

        return handler

    def _both_ways(self, answer: Answer, path: str) -> Answer:
        def handler(requests: Iterator[Any], context: Context) -> Iterator[Any]:
            try:
                if path == WATCHES_ITSELF:
                    yield from answer(requests, context)
                else:
                    yield from self._sent(answer(self._watched(requests, context, path), context), context, path)
            finally:
                self._leave()

        return handler

    def _next(self, requests: Iterator[Any], context: Context, path: str) -> Any:
        """Return the next message, or None at the end; wait at most max_message_s."""
        try:
            with self.arriving.stream(context.cancel, caller_of(context)):
                return next(requests, None)
        except (ShardlossError, grpc.RpcError) as error:  # RpcError: gRPC refused the message, or the caller has left
            self._call_log.refuse(path, context, error)

    def _watched(self, requests: Iterator[Any], context: Context, path: str) -> Iterator[Any]:
        while (request := self._next(requests, context, path)) is not None:
            yield request

    def _sent(self, replies: Iterator[Any], context: Context, path: str) -> Iterator[Any]:
        """Yield the replies; wait at most max_message_s for the client to read each one."""
        for reply in replies:
            try:
                with self.arriving.stream(context.cancel, caller_of(context)):
                    yield reply
            except ShardlossError as error:
                self._call_log.refuse(path, context, error)

    def _leave(self) -> None:
        with self._lock:
            self.num_inside -= 1
