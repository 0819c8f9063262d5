"""A health probe of a server, for instance for a container's health check; it imports neither torch nor ray."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardloss_server.access.certificates import no_password
from shardloss_server.access.watched import Unreadable, content_of


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM files for a port with TLS: the CA of the server's certificate and, for mutual TLS, the client's own."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the credentials to connect with; None means plaintext.

        Raises:
            Unreadable: a file cannot be read or is not PEM, or files are missing; gRPC would only say UNAVAILABLE.
        """
        files = {"ca_file": self.ca_file, "client_key_file": self.key_file, "client_cert_file": self.cert_file}
        given = {name: content_of(path, name) for name, path in files.items() if path is not None}
        if not given:
            return None
        if self.ca_file is None or (self.cert_file is None) != (self.key_file is None):
            raise Unreadable("TLS needs --ca-file, and mutual TLS --client-cert-file and --client-key-file as well")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file, password=no_password)
        except (ssl.SSLError, ValueError) as error:
            raise Unreadable(f"{', '.join(given)} cannot be used: {error}") from None
        return grpc.ssl_channel_credentials(*(given.get(name) for name in files))


PLAINTEXT = Identity()


def health_of(address: str, timeout_s: float, identity: Identity = PLAINTEXT) -> str:
    """Return the port's answer (SERVING, NOT_SERVING, UNKNOWN or SERVICE_UNKNOWN), or why there is none, as text.

    Raises:
        Unreadable: a file of the identity cannot be used.
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
