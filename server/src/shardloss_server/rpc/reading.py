"""Refusal of requests that cannot be decoded: INVALID_ARGUMENT, since gRPC itself would report INTERNAL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from shardloss.errors import InvalidArgument

from shardloss_server.rpc.call import CallLog


class Unreadable:
    """The result of a deserializer for bytes that it cannot decode."""

    def __init__(self, method: str) -> None:
        self.error = InvalidArgument(
            f"the bytes are not a request of {method}: does the client use a different version of the contract?"
        )


class Reading(grpc.ServerInterceptor):
    """An interceptor that makes every method refuse requests that cannot be decoded."""

    def __init__(self, call_log: CallLog) -> None:
        self._call_log = call_log

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Return the method's handler; in a bidirectional stream, its request iterator raises InvalidArgument."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is None or handler.request_deserializer is None:
            return handler
        reader = reading(handler.request_deserializer, method)
        if handler.unary_unary:
            answer = refusing(handler.unary_unary, method, self._call_log)
            return grpc.unary_unary_rpc_method_handler(answer, reader, handler.response_serializer)
        if handler.unary_stream:
            answer = refusing(handler.unary_stream, method, self._call_log)
            return grpc.unary_stream_rpc_method_handler(answer, reader, handler.response_serializer)
        if handler.stream_stream:
            answer = checking(handler.stream_stream, method, self._call_log)
            return grpc.stream_stream_rpc_method_handler(answer, reader, handler.response_serializer)
        return handler


def reading(read: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """Return a deserializer that never raises; it returns `Unreadable` instead."""

    def readable(content: bytes) -> Any:
        try:
            return read(content)
        except DecodeError:
            return Unreadable(method)

    return readable


Answer = Callable[..., Any]


def refusing(answer: Answer, path: str, call_log: CallLog) -> Answer:
    """Return a method of one request that refuses a request that could not be decoded."""

    @functools.wraps(answer)  # also copies attributes that gRPC reads, such as experimental_non_blocking
    def answered(request: Any, context: grpc.ServicerContext, *send: Any) -> Any:
        if isinstance(request, Unreadable):
            call_log.refuse(path, context, request.error)
        return answer(request, context, *send)

    return answered


def checking(answer: Answer, path: str, call_log: CallLog) -> Answer:
    """Return a streaming method whose iterator raises InvalidArgument for a piece that could not be decoded.

    The error also ends the call here, since third-party methods do not handle it.
    """

    def pieces(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            if isinstance(request, Unreadable):
                raise request.error
            yield request

    def answered(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from answer(pieces(requests), context)
        except InvalidArgument as error:
            call_log.refuse(path, context, error)

    return answered
