"""Refusal of unsafe settings: anonymous callers, or tokens in plaintext, on a non-loopback address."""

from __future__ import annotations

from shardloss.address import is_loopback

from shardloss_server.config import CannotServe, Security


def refuse_exposed(host: str, security: Security) -> None:
    """Refuse unsafe settings unless they are allowed explicitly.

    Raises:
        CannotServe: TLS settings are incomplete, or other machines could call as admin or read tokens in transit.
    """
    if security.tls_cert_file is None:
        given = {"tls_key_file": security.tls_key_file, "tls_client_ca_file": security.tls_client_ca_file}
        for name, value in given.items():
            if value is not None:
                raise CannotServe(f"{name} = {value} is set without tls_cert_file: set the server's certificate, too")
    elif security.tls_key_file is None:
        raise CannotServe(
            f"tls_cert_file = {security.tls_cert_file} is set without tls_key_file: set its private key, too"
        )
    if is_loopback(host):
        return
    if security.tokens_file is None and security.tls_client_ca_file is None and not security.allow_anonymous:
        raise CannotServe(
            f"host = {host} can be reached from other machines, and neither tokens_file nor tls_client_ca_file is set: "
            "everyone would be admin. Set one of them (`shardloss-server tokens init` creates tokens), listen on "
            "127.0.0.1, or set allow_anonymous if you trust everyone on the network"
        )
    if security.tokens_file is not None and security.tls_cert_file is None and not security.allow_plaintext_tokens:
        raise CannotServe(
            f"host = {host} can be reached from other machines, and others could read tokens sent in plaintext. "
            "Set tls_cert_file and tls_key_file, listen on 127.0.0.1, or set allow_plaintext_tokens if something else "
            "encrypts the traffic or you trust everyone on the network"
        )
