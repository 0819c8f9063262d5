"""The gate: before a call takes a thread it is counted, and while its message is on the way it is watched.

gRPC gives a unary call a thread, which waits for the message for as long as the client likes. So every unary method is
served as a stream of one message, which is the same on the wire: its handler begins before the message is there, may
count the call by its caller, and has the call at hand for the watch to drop.
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
from shardloss_server.rpc.caller import caller_of
from shardloss_server.rpc.splicing import SERVICE
from shardloss_server.rpc.status import fail

DRAINING_RETRY_S = 1.0
WATCHES_ITSELF = f"/{SERVICE}/StreamLoss"  # from its first piece to its last, by `Handlers.streams`
Answer = Callable[..., Any]


class Gate(grpc.ServerInterceptor):
    """Lets at most max_inside calls take a thread, from their first byte to the end of their handler. Thread-safe.

    arriving are the places of calls whose message is on its way.
    """

    def __init__(self, max_inside: int, arriving: LiveStreams) -> None:
        self._max_inside, self.arriving = max_inside, arriving
        self._hints = Hints()
        self._lock = threading.Lock()
        self._is_draining = False
        self.num_inside = 0
        self.num_refused = 0

    def drain(self) -> None:
        """From now on refuse every new call as SERVER_UNAVAILABLE."""
        self._is_draining = True

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The handler of a method behind the gate, or one that refuses without waiting for a message."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        with self._lock:
            error = self._refusal()
            self.num_refused += error is not None
            self.num_inside += error is None
        return refusing(error) if error is not None else self._behind(handler, handler_call_details.method)

    def _refusal(self) -> ShardlossError | None:
        if self._is_draining:
            return ServerUnavailable("the server is shutting down", retry_after_s=DRAINING_RETRY_S)
        if self.num_inside >= self._max_inside:
            return Overloaded(f"{self.num_inside} calls are inside", retry_after_s=self._hints.next())
        return None

    def _behind(self, handler: Any, method: str) -> Any:
        """The same method as a stream of requests."""
        read, write = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._one_message(handler.unary_unary), read, write)
        if handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(self._one_message(handler.unary_stream), read, write)
        if handler.stream_stream:
            answer = self._stream(handler.stream_stream, method == WATCHES_ITSELF)
            return grpc.stream_stream_rpc_method_handler(answer, read, write)
        return grpc.stream_unary_rpc_method_handler(self._whole(handler.stream_unary), read, write)

    def _one_message(self, answer: Answer) -> Answer:
        @functools.wraps(answer)  # and with it what gRPC reads of a handler, such as that it does not block
        def handler(requests: Iterator[Any], context: grpc.ServicerContext, *send: Any) -> Any:
            try:
                return answer(self._received(requests, context), context, *send)
            finally:
                self._leave()

        return handler

    def _received(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The one message of a call."""
        try:
            with self.arriving.stream(context.cancel, caller_of(context)):
                request = next(requests, None)
            if request is None:
                raise InvalidArgument("the call ended without its message")
            return request
        except ShardlossError as error:
            with self._lock:
                self.num_refused += 1
            fail(context, error)

    def _whole(self, answer: Answer) -> Answer:
        """A method that takes its requests as a stream and gives one answer."""

        def handler(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                return answer(requests, context)
            finally:
                self._leave()

        return handler

    def _stream(self, answer: Answer, watches_itself: bool) -> Answer:
        def handler(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from answer(requests if watches_itself else self._watched(requests, context), context)
            finally:
                self._leave()

        return handler

    def _watched(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Requests, for each of which the client may not be waited for longer than for a message."""
        while True:
            try:
                with self.arriving.stream(context.cancel, caller_of(context)):
                    request = next(requests, None)
            except ShardlossError as error:
                fail(context, error)
            if request is None:
                return
            yield request

    def _leave(self) -> None:
        with self._lock:
            self.num_inside -= 1


def refusing(error: ShardlossError) -> Any:
    """A handler of any method that ends its call with an error at once, whether or not a message comes."""

    def refuse(_requests: Iterator[Any], context: grpc.ServicerContext) -> None:
        fail(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)
