"""A health probe of a server, for instance for a container's health check; it imports neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM files for a port with TLS: the CA of the server's certificate and, for mutual TLS, the client's own."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the credentials to connect with; None means plaintext.

        Raises:
            OSError: a file cannot be read.
        """
        if self.ca_file is None:
            return None
        ca, key, cert = (
            None if path is None else path.read_bytes() for path in (self.ca_file, self.key_file, self.cert_file)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


PLAINTEXT = Identity()


def health_of(address: str, timeout_s: float, identity: Identity = PLAINTEXT) -> str:
    """Return the port's answer (SERVING, NOT_SERVING, UNKNOWN or SERVICE_UNKNOWN), or why there is none, as text.

    Raises:
        OSError: a file of the identity cannot be read.
    """
    credentials = identity.credentials()
    channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return status
