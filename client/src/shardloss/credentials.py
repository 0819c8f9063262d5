"""What a client shows and asks of a server: a token, certificates, and where neither may be sent."""

from __future__ import annotations

import os
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from shardloss.errors import InvalidArgument

LOOK_AGAIN_S = 1.0  # how often a token file is looked at
FilePath = str | os.PathLike[str]
SCHEMES = ("dns:", "ipv4:", "ipv6:")


@dataclass(frozen=True, slots=True)
class Credentials:
    """As `shardloss.connect` takes them; of none, the connection is plaintext and without a token."""

    token: str | None = field(default=None, repr=False)
    token_file: FilePath | None = None
    tls: bool = False
    ca_file: FilePath | None = None
    client_cert_file: FilePath | None = None
    client_key_file: FilePath | None = None
    allow_plaintext_token: bool = False

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted: any of the files of TLS asks for it."""
        return self.tls or any(file is not None for file in (self.ca_file, self.client_cert_file, self.client_key_file))

    def check(self, address: str) -> None:
        """Refuse what does not fit together, and a token that others could read on its way.

        Raises:
            InvalidArgument: the message says what to do.
        """
        if self.token is not None and self.token_file is not None:
            raise InvalidArgument("give token or token_file, not both", field="token")
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise InvalidArgument("client_cert_file and client_key_file go together", field="client_cert_file")
        has_token = self.token is not None or self.token_file is not None
        if has_token and not (self.is_tls or self.allow_plaintext_token or is_local(address)):
            message = (
                f"a token would go to {address} in plaintext, for others to read: give ca_file (or tls=True), or "
                "allow_plaintext_token=True where something else encrypts, or the network is yours alone"
            )
            raise InvalidArgument(message, field="token")

    def certificates(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """(roots, private key, certificate chain) as PEM; None is gRPC's own roots, and no certificate.

        Raises:
            InvalidArgument: a file cannot be read, or is no PEM, or the key is another certificate's.
        """
        roots = self.ca_file if self.ca_file is not None else ssl.get_default_verify_paths().cafile
        found = (
            None if roots is None else content_of(roots, "ca_file"),
            None if self.client_key_file is None else content_of(self.client_key_file, "client_key_file"),
            None if self.client_cert_file is None else content_of(self.client_cert_file, "client_cert_file"),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        field_name = "ca_file"
        try:  # gRPC would say no more than that nobody answers
            if roots is not None:
                context.load_verify_locations(roots)
            field_name = "client_cert_file"
            if self.client_cert_file is not None:
                context.load_cert_chain(self.client_cert_file, self.client_key_file, password=no_password)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument(f"{field_name} cannot be used: {error}", field=field_name) from None
        return found


def no_password() -> str:
    """A key with a password would have OpenSSL ask for it at a terminal."""
    raise ValueError("the key has a password")


class Bearer:
    """The token of each call; one of a file is read again where the file changes. Thread-safe."""

    def __init__(self, credentials: Credentials) -> None:
        """Raises InvalidArgument where the token, or what its file holds, is none."""
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
        """What goes with a call."""
        if self._file is not None and time.monotonic() - self._looked >= LOOK_AGAIN_S:
            self.renew()
        return () if self._token is None else (("authorization", f"Bearer {self._token}"),)

    def renew(self) -> bool:
        """Look at the file again; whether it held another token. One that cannot be read changes nothing."""
        if self._file is None:
            return False
        with self._looking:
            self._looked, before, stamp = time.monotonic(), self._token, stamp_of(self._file)
            if stamp is None or stamp == self._stamp:
                return False
            with suppress(InvalidArgument):  # half written: the next look tells
                self._token, self._stamp = token_in(self._file), stamp
            return self._token != before


def token_in(path: Path) -> str:
    """The token that a file holds.

    Raises:
        InvalidArgument: it cannot be read, or holds none.
    """
    return checked(content_of(path, "token_file").decode("utf-8", "replace"), f"token_file {path}")


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What changes where a file does; None: it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def checked(text: str, where: str) -> str:
    """A token as it goes into metadata.

    Raises:
        InvalidArgument: it is empty, or holds what metadata cannot; it is not shown.
    """
    token = text.strip()
    if not token or not all(0x21 <= ord(char) <= 0x7E for char in token):
        message = f"{where} holds no token: one word of printable ASCII characters is needed"
        raise InvalidArgument(message, field="token")
    return token


def content_of(path: FilePath, name: str) -> bytes:
    """A file's bytes.

    Raises:
        InvalidArgument: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read {name} {os.fspath(path)}: {error.strerror}", field=name) from None


def is_local(address: str) -> bool:
    """Whether a gRPC address is on this machine for sure: a Unix socket, localhost or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in SCHEMES:
        address = address.removeprefix(scheme)
    return is_loopback(host_of(address.removeprefix("///")))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; names other than localhost, and every address at once, do not count."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def host_of(address: str) -> str:
    """The host of host:port, [host]:port or host."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]
