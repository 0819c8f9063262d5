"""Credentials of a client: its token, its certificates, and the check that a token is not exposed in plaintext."""

from __future__ import annotations

import os
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shardloss.address import is_local
from shardloss.errors import InvalidArgument

LOOK_AGAIN_S = 1.0  # minimum time between two checks of a token file
MOST_BYTES = 2**24  # of a file with a token or with certificates, which take kilobytes
FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credential arguments of `shardloss.connect`. With none set: plaintext, no token."""

    token: str | None = field(default=None, repr=False)
    token_file: FilePath | None = None
    tls: bool = False
    ca_file: FilePath | None = None
    client_cert_file: FilePath | None = None
    client_key_file: FilePath | None = None
    allow_plaintext_token: bool = False

    @property
    def is_tls(self) -> bool:
        """True if the connection is encrypted: tls is True, or a certificate or key file is given."""
        return self.tls or any(file is not None for file in (self.ca_file, self.client_cert_file, self.client_key_file))

    def check(self, address: str) -> None:
        """Raise `InvalidArgument` if arguments conflict or a token would be sent over a network in plaintext.

        Raises:
            InvalidArgument: the arguments conflict, or a token would be exposed; the message says how to fix it.
        """
        if self.token is not None and self.token_file is not None:
            raise InvalidArgument("pass token or token_file, not both", field="token")
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise InvalidArgument("pass client_cert_file and client_key_file together", field="client_cert_file")
        has_token = self.token is not None or self.token_file is not None
        if has_token and not (self.is_tls or self.allow_plaintext_token or is_local(address)):
            message = (
                f"a token would be sent to {address} in plaintext, where others could read it: pass ca_file (or "
                "tls=True), or allow_plaintext_token=True if another layer encrypts or the network is private"
            )
            raise InvalidArgument(message, field="token")

    def certificates(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return (roots, private key, certificate chain) as PEM; None stands for gRPC's own roots or no certificate.

        Raises:
            InvalidArgument: a file cannot be read or is not PEM, or the key does not belong to the certificate.
        """
        roots = self._roots()
        found = (
            None if roots is None else content_of(roots, "ca_file"),
            None if self.client_key_file is None else content_of(self.client_key_file, "client_key_file"),
            None if self.client_cert_file is None else content_of(self.client_cert_file, "client_cert_file"),
        )
        self.context()  # gRPC itself would only report that the server is unavailable
        return found

    def context(self) -> ssl.SSLContext:
        """Return a TLS context with these files.

        Raises:
            InvalidArgument: a file is not PEM, or the key does not belong to the certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        field_name, roots = "ca_file", self._roots()
        try:
            if roots is not None:
                context.load_verify_locations(roots)
            field_name = "client_cert_file"
            if self.client_cert_file is not None:
                context.load_cert_chain(self.client_cert_file, self.client_key_file, password=no_password)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument(f"{field_name} cannot be used: {error}", field=field_name) from None
        return context

    def _roots(self) -> FilePath | None:
        return self.ca_file if self.ca_file is not None else ssl.get_default_verify_paths().cafile


def no_password() -> str:
    """Raise ValueError; without this callback OpenSSL would prompt at the terminal for the password of a key."""
    raise ValueError("the key is protected by a password")


class Bearer:
    """Source of the token that each call sends; a token file is read again when it changes. Thread-safe."""

    def __init__(self, credentials: Credentials) -> None:
        """Read the token; raise `InvalidArgument` if the token or the content of its file is not valid."""
        self._file = None if credentials.token_file is None else Path(credentials.token_file)
        self._looking = threading.Lock()
        self._looked = time.monotonic()
        self._stamp: tuple[int, int, int] | None = None
        self._token: str | None = None
        if self._file is not None:
            self._stamp, self._token = stamp_of(self._file), token_in(self._file)
        elif credentials.token is not None:
            self._token = checked(credentials.token, "token")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata to send with a call: the authorization header, or nothing if there is no token."""
        if self._file is not None and time.monotonic() - self._looked >= LOOK_AGAIN_S:
            self.renew()
        return () if self._token is None else (("authorization", f"Bearer {self._token}"),)

    def renew(self) -> bool:
        """Read the token file again if it has changed and return True if the token is new.

        A file that cannot be read changes nothing.
        """
        if self._file is None:
            return False
        with self._looking:
            self._looked, before, stamp = time.monotonic(), self._token, stamp_of(self._file)
            if stamp is None or stamp == self._stamp:
                return False
            with suppress(InvalidArgument):  # a half-written file is read again at the next check
                self._token, self._stamp = token_in(self._file), stamp
            return self._token != before


def token_in(path: Path) -> str:
    """Return the token in a file.

    Raises:
        InvalidArgument: the file cannot be read or contains no valid token.
    """
    return checked(content_of(path, "token_file").decode("utf-8", "replace"), f"token_file {path}")


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return (mtime, size, inode), which changes when the file changes, or None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: the path contains a zero byte
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def checked(text: str, where: str) -> str:
    """Return a token without surrounding whitespace, as it is sent in metadata.

    Raises:
        InvalidArgument: the token is empty or has characters that metadata cannot contain. The message does not show
            the token.
    """
    token = text.strip()
    if not token or not all(0x21 <= ord(char) <= 0x7E for char in token):
        message = f"{where} contains no valid token: one word of printable ASCII characters is needed"
        raise InvalidArgument(message, field="token")
    return token


def content_of(path: FilePath, name: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        InvalidArgument: the file cannot be read, or is too large, as a device is; the error names the argument.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgument(f"cannot read {name} {os.fspath(path)}: {reason}", field=name) from None
    if len(content) > MOST_BYTES:
        raise InvalidArgument(f"{name} {os.fspath(path)} is larger than {MOST_BYTES} bytes", field=name)
    return content
