"""Bytes that are no message are the caller's mistake: INVALID_ARGUMENT, where gRPC itself would say INTERNAL."""

from __future__ import annotations

import functools
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
        if handler.unary_stream:
            answer = refusing(handler.unary_stream, method, self._call_log)
            return grpc.unary_stream_rpc_method_handler(answer, reader, handler.response_serializer)
        if handler.stream_stream:
            answer = checking(handler.stream_stream, method, self._call_log)
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


Answer = Callable[..., Any]


def refusing(answer: Answer, path: str, call_log: CallLog) -> Answer:
    """A method of one request that refuses what was not read."""

    @functools.wraps(answer)  # and with it what gRPC reads of a handler, such as that it does not block
    def answered(request: Any, context: grpc.ServicerContext, *send: Any) -> Any:
        if isinstance(request, Unreadable):
            call_log.refuse(path, context, request.error)
        return answer(request, context, *send)

    return answered


def checking(answer: Answer, path: str, call_log: CallLog) -> Answer:
    """A method of streams whose iterator raises where a piece was not read; others' methods know no error of ours."""

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
