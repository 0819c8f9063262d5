"""The same bytes sent and returned in one plain unary gRPC call of a protobuf message; only its size limit is raised.

The shape: bytes, each way.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue

from benchmarks.rivals.child import Child, main, serve_child

MODULE = "benchmarks.rivals.grpc_echo"
METHOD = "Echo"
LIMITS = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.max_send_message_length", 64 * 2**20)]
THREADS = 4


class Echo:
    """The caller, with the server in a child process."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        self.server = Child(MODULE, shape)
        self.channel = grpc.insecure_channel(self.server.ready["address"], options=LIMITS)
        self.call = self.channel.unary_unary(
            f"/{MODULE}/{METHOD}",
            request_serializer=BytesValue.SerializeToString,
            response_deserializer=BytesValue.FromString,
        )
        self.hidden = np.random.default_rng(0).standard_normal(shape["bytes"] // 4, dtype=np.float32)

    def versions(self) -> Mapping[str, str]:
        return {"grpcio": grpc.__version__}

    def step(self) -> None:
        reply = self.call(BytesValue(value=self.hidden.tobytes()), timeout=60)
        assert np.frombuffer(reply.value, np.float32).shape == self.hidden.shape

    def close(self) -> None:
        """End the server."""
        self.channel.close()
        self.server.stop()


def echo(request: BytesValue, _context: grpc.ServicerContext) -> BytesValue:
    """Return the received bytes, parsed as numbers and serialised again."""
    return BytesValue(value=np.frombuffer(request.value, np.float32).tobytes())


def run_server(_shape: Mapping[str, Any]) -> None:
    """Answer calls until stdin closes."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=LIMITS)
    handler = grpc.unary_unary_rpc_method_handler(
        echo, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(MODULE, {METHOD: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    serve_child({"address": f"127.0.0.1:{port}"})
    server.stop(1.0).wait()


if __name__ == "__main__":
    main(Echo, run_server)
