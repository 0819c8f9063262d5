"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where gRPC itself would say INTERNAL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from shardloss.errors import InvalidArgument

from shardloss_server.rpc.call import CallLog


class Unreadable:
    """What a deserializer gives in place of a message that cannot be read."""

    def __init__(self, method: str) -> None:
        self.error = InvalidArgument(f"the bytes are no request of {method}: is the client's contract another one?")


class Reading(grpc.ServerInterceptor):
    """Every method refuses what it cannot read by name."""

    def __init__(self, call_log: CallLog) -> None:
        self._call_log = call_log

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The handler of a method; of streams both ways, its iterator raises InvalidArgument."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is None or handler.request_deserializer is None:
            return handler
        reader = reading(handler.request_deserializer, method)
        if handler.unary_unary:
            answer = refusing(handler.unary_unary, method, self._call_log)
            return grpc.unary_unary_rpc_method_handler(answer, reader, handler.response_serializer)
        if handler.stream_stream:
            answer = checking(handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(answer, reader, handler.response_serializer)
        return handler


def reading(read: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """A deserializer that never fails."""

    def readable(content: bytes) -> Any:
        try:
            return read(content)
        except DecodeError:
            return Unreadable(method)

    return readable


def refusing(
    answer: Callable[[Any, grpc.ServicerContext], Any], path: str, call_log: CallLog
) -> Callable[[Any, grpc.ServicerContext], Any]:
    """A unary method that refuses what was not read."""

    def answered(request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, Unreadable):
            call_log.refuse(path, context, request.error)
        return answer(request, context)

    return answered


def checking(answer: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """A method of streams whose iterator raises where a piece was not read."""

    def pieces(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            if isinstance(request, Unreadable):
                raise request.error
            yield request

    return lambda requests, context: answer(pieces(requests), context)
