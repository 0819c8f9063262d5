"""Where a server may listen without asking who calls, and take tokens that others could read."""

from __future__ import annotations

from shardloss.credentials import is_loopback

from shardloss_server.config import CannotServe, Security


def refuse_exposed(host: str, security: Security) -> None:
    """Refuse what an operator would regret, unless asked for by name.

    Raises:
        CannotServe: TLS settings do not fit together, or others could call as admin, or read tokens on the way.
    """
    if security.tls_cert_file is None:
        given = {"tls_key_file": security.tls_key_file, "tls_client_ca_file": security.tls_client_ca_file}
        for name, value in given.items():
            if value is not None:
                raise CannotServe(f"{name} = {value} without tls_cert_file: give the server's certificate, too")
    elif security.tls_key_file is None:
        raise CannotServe(f"tls_cert_file = {security.tls_cert_file} without tls_key_file: give its private key, too")
    if is_loopback(host):
        return
    if security.tokens_file is None and security.tls_client_ca_file is None and not security.allow_anonymous:
        raise CannotServe(
            f"host = {host} is reached from other machines, and there is neither tokens_file nor tls_client_ca_file: "
            "everyone would be admin. Set one of them (`shardloss-server tokens init` makes tokens), listen on "
            "127.0.0.1, or set allow_anonymous where the network is yours alone"
        )
    if security.tokens_file is not None and security.tls_cert_file is None and not security.allow_plaintext_tokens:
        raise CannotServe(
            f"host = {host} is reached from other machines, and tokens would come in plaintext for others to read. "
            "Set tls_cert_file and tls_key_file, listen on 127.0.0.1, or set allow_plaintext_tokens where something "
            "else encrypts, or the network is yours alone"
        )
