"""TLS of both ports, with certificate files checked for changes at every handshake. gRPC accepts TLS 1.2 and later."""

from __future__ import annotations

import grpc

from shardloss_server.access.certificates import Certificates, watched_certificates
from shardloss_server.access.watched import Unreadable
from shardloss_server.config import CannotServe, Security


def credentials(security: Security) -> grpc.ServerCredentials | None:
    """Return the credentials of one port; None means plaintext.

    Each port needs its own, since gRPC fetches a change once and not once per port.

    Raises:
        CannotServe: a file is missing or invalid.
    """
    chain, key, client_ca = security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file
    if chain is None or key is None:
        return None
    try:
        certificates = watched_certificates(chain, key, client_ca)
    except Unreadable as error:
        raise CannotServe(str(error)) from None
    served = certificates.value()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        latest = certificates.value()
        if latest is served:
            return None  # no change
        served = latest
        return configuration(latest)

    # The stub does not allow None, which by the documentation means "no change".
    return grpc.dynamic_ssl_server_credentials(configuration(served), fetch, client_ca is not None)  # type: ignore[arg-type]


def configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    """Return the certificates in the form that gRPC expects."""
    return grpc.ssl_server_certificate_configuration([(certificates.key, certificates.chain)], certificates.client_ca)
