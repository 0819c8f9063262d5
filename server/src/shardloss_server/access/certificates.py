"""The server's certificate and key, and the CA of its clients, as PEM files that may change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from shardloss_server.access.watched import Unreadable, Watched, content_of, warn_where_others_read

OTHERS_READ = 0o077


@dataclass(frozen=True, slots=True)
class Certificates:
    """A server's certificates as PEM bytes; with client_ca None, clients need no certificate."""

    key: bytes
    chain: bytes
    client_ca: bytes | None


def watched_certificates(chain: Path, key: Path, client_ca: Path | None) -> Watched[Certificates]:
    """Watch the certificates in these files, which are checked for changes at every handshake.

    Raises:
        Unreadable: a file is missing or not PEM, or the key belongs to another certificate.
    """
    paths = [path for path in (chain, key, client_ca) if path is not None]
    return Watched(paths, lambda: read(chain, key, client_ca), interval_s=0.0)


def read(chain: Path, key: Path, client_ca: Path | None) -> Certificates:
    """Return the content of the files, after checking that they match.

    Raises:
        Unreadable: they do not match, or a file cannot be read; the message names the file.
    """
    found = Certificates(
        content_of(key, "tls_key_file"),
        content_of(chain, "tls_cert_file"),
        None if client_ca is None else content_of(client_ca, "tls_client_ca_file"),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(chain, key, password=no_password)
    except (ssl.SSLError, ValueError, TypeError) as error:
        raise Unreadable(f"tls_cert_file {chain} and tls_key_file {key} do not match: {error}") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise Unreadable(f"tls_client_ca_file {client_ca} contains no PEM certificates: {error}") from None
    warn_where_others_read(key, OTHERS_READ, "the private key")
    return found


def no_password() -> str:
    """Refuse a key with a password, for which OpenSSL would otherwise prompt at a terminal."""
    raise ValueError("the key has a password, for which the server cannot prompt: store the key without one")
