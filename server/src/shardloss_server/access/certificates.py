"""The server's certificate and key, and whose clients it takes, as PEM files that may change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from shardloss_server.access.watched import Unreadable, Watched, warn_where_others_read

OTHERS_READ = 0o077


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM bytes; client_ca None takes clients without a certificate."""

    key: bytes
    chain: bytes
    client_ca: bytes | None


def watched_certificates(chain: Path, key: Path, client_ca: Path | None) -> Watched[Certificates]:
    """The certificates in these files, looked at with every handshake.

    Raises:
        Unreadable: a file is missing, is no PEM, or the key is another certificate's.
    """
    paths = [path for path in (chain, key, client_ca) if path is not None]
    return Watched(paths, lambda: read(chain, key, client_ca), interval_s=0.0)


def read(chain: Path, key: Path, client_ca: Path | None) -> Certificates:
    """The content of the files, once they are known to fit.

    Raises:
        Unreadable: they do not; the message names the file.
    """
    found = Certificates(content_of(key), content_of(chain), None if client_ca is None else content_of(client_ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(chain, key, password=no_password)
    except (ssl.SSLError, ValueError, TypeError) as error:
        raise Unreadable(f"tls_cert_file {chain} and tls_key_file {key} do not fit: {error}") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise Unreadable(f"tls_client_ca_file {client_ca} holds no PEM certificates: {error}") from None
    warn_where_others_read(key, OTHERS_READ, "the private key")
    return found


def content_of(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        Unreadable: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror}") from None


def no_password() -> str:
    """A key with a password would have OpenSSL ask for it at a terminal."""
    raise ValueError("the key has a password, and the server none for it")
