"""A health probe of a server, for instance for a container's health check; it imports neither torch nor ray."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shardloss.address import checked
from shardloss.channel import opened
from shardloss.credentials import Credentials
from shardloss.reach import why


def health_of(address: str, timeout_s: float, credentials: Credentials) -> str:
    """Return the port's answer (SERVING, NOT_SERVING, UNKNOWN or SERVICE_UNKNOWN), or why there is none, as text.

    Raises:
        InvalidArgument: the address is malformed, or a file of the credentials cannot be used.
    """
    with opened(checked(address), credentials) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            is_away = error.code() is grpc.StatusCode.UNAVAILABLE
            return f"{error.code().name}: {why(address, credentials) if is_away else error.details()}"
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return status
