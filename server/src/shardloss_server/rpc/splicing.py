"""Splicing of the large tensors of a call, which bypass protobuf on the way in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from shardloss.splice import LOSS_REPLY, LOSS_REQUEST, STREAM_REPLY, STREAM_REQUEST
from shardloss.v1 import loss_pb2

SERVICE = loss_pb2.DESCRIPTOR.services_by_name["LossService"].full_name


class Splicing(grpc.ServerInterceptor):
    """An interceptor that gives ComputeLoss and StreamLoss `shardloss.splice.Spliced` requests and replies."""

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Return the method's handler, with splicing serializers if it has large tensors."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is not None and method == f"/{SERVICE}/ComputeLoss":
            return grpc.unary_unary_rpc_method_handler(handler.unary_unary, LOSS_REQUEST.split, LOSS_REPLY.join)
        if handler is not None and method == f"/{SERVICE}/StreamLoss":
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, STREAM_REQUEST.split, STREAM_REPLY.join)
        return handler
