"""The entries of a tokens file: the tokens and certificates that may call a server.

[[token]]                             a bearer token; the file holds its digest, never the token
name = "trainer-1"                    unique; shown in the log and by `tokens list`
role = "trainer"                      "reader", "trainer" or "admin"
sha256 = "9f86d081..."                64 hexadecimal digits
expires = 2027-01-01T00:00:00Z        if absent, the token never expires

[[certificate]]                       a client certificate, under mutual TLS
name = "trainer-1.example.org"        its common name, or one of its DNS names or URIs
role = "trainer"
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from shardloss_server.access.watched import Unreadable

TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
KEYS = {"token": {"name", "role", "sha256", "expires"}, "certificate": {"name", "role"}}
NEEDED = {"token": {"name", "role", "sha256"}, "certificate": {"name", "role"}}


class BadTokens(Unreadable):
    """An invalid tokens file; the message says where, what was found and what is needed."""


class Role(IntEnum):
    """A caller's role; each role includes the ones before it. The numbers are those of options.proto."""

    READER = 1
    TRAINER = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """The role's name in tokens files and messages."""
        return self.name.lower()


ROLES = {role.word: role for role in Role}


@dataclass(frozen=True, slots=True)
class Token:
    """The entry of one bearer token; digest is its SHA-256, and with expires None it never expires."""

    name: str
    role: Role
    digest: bytes
    expires: datetime | None = None

    def is_expired(self, now: datetime) -> bool:
        """Return True if the token has expired at `now`."""
        return self.expires is not None and now >= self.expires


@dataclass(frozen=True, slots=True)
class Grants:
    """The tokens that a server knows, and the roles of client certificates by name."""

    tokens: tuple[Token, ...] = ()
    certificates: Mapping[str, Role] = field(default_factory=lambda: MappingProxyType({}))

    def token(self, secret: bytes) -> Token | None:
        """Return the entry of a token, expired or not; the time taken reveals neither its place nor a partial match."""
        digest, found = digest_of(secret), None
        for token in self.tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def certificate(self, names: Iterable[str]) -> Role | None:
        """Return the highest role of a certificate's names, or None if none is known."""
        return max((self.certificates[name] for name in names if name in self.certificates), default=None)


def digest_of(secret: bytes) -> bytes:
    """Return the digest of a token: a plain SHA-256, which is safe since tokens are long and random."""
    return hashlib.sha256(secret).digest()


def parse(text: str) -> Grants:
    """Parse the text of a tokens file.

    Raises:
        BadTokens: the text is not TOML, or an entry is invalid; the message names the entry and the problem.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadTokens(f"it is not TOML: {error}") from None
    for key in tree.keys() - KEYS.keys():
        raise BadTokens(f"{key!r} is unknown: a tokens file has only [[token]] and [[certificate]] entries")
    tokens = tuple(token_of(entry, where) for where, entry in entries(tree, "token"))
    refuse_twice("name", [token.name for token in tokens])
    refuse_twice("sha256", [token.digest.hex() for token in tokens])
    certificates = [(entry["name"], role_of(entry, where)) for where, entry in entries(tree, "certificate")]
    refuse_twice("name", [name for name, _ in certificates], "certificate")
    return Grants(tokens, MappingProxyType(dict(certificates)))


def entries(tree: Mapping[str, Any], kind: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (where, entry) for each entry of one kind, its keys checked; `where` counts from 1."""
    found = tree.get(kind, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BadTokens(f"{kind} must be a list of entries, each under [[{kind}]]")
    for number, entry in enumerate(found, 1):
        where = f"[[{kind}]] {number}"
        for key in sorted(entry.keys() - KEYS[kind]):
            raise BadTokens(f"{where}: {key!r} is unknown; an entry has {', '.join(sorted(KEYS[kind]))}")
        for key in sorted(NEEDED[kind] - entry.keys()):
            raise BadTokens(f"{where}: {key} is missing")
        if not isinstance(entry["name"], str) or not entry["name"]:
            raise BadTokens(f"{where}: name = {entry['name']!r} must be non-empty text")
        yield where, entry


def token_of(entry: Mapping[str, Any], where: str) -> Token:
    """Return one [[token]]; errors never quote its digest, in case a token was written there by mistake."""
    if not TOKEN_NAME.fullmatch(entry["name"]):
        raise BadTokens(f"{where}: name = {entry['name']!r} must be at most 64 letters, digits and ._@-")
    digest = entry["sha256"]
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise BadTokens(f"{where}: sha256 must be 64 lower-case hexadecimal digits: `tokens create` writes entries")
    expires = expiry_of(entry["expires"], where) if "expires" in entry else None
    return Token(entry["name"], role_of(entry, where), bytes.fromhex(digest), expires)


def role_of(entry: Mapping[str, Any], where: str) -> Role:
    """Return the role that an entry names."""
    role = entry["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadTokens(f"{where}: role = {role!r} must be one of {', '.join(ROLES)}")
    return ROLES[role]


def expiry_of(value: object, where: str) -> datetime:
    """Return the expiry time of a token, given as a TOML date-time with offset or as text of that form (RFC 3339)."""
    when = value
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            when = None
    if not isinstance(when, datetime) or when.tzinfo is None:
        raise BadTokens(f"{where}: expires = {str(value)!r} must be a time like 2027-01-01T00:00:00Z")
    return when.astimezone(UTC)


def refuse_twice(key: str, values: list[str], kind: str = "token") -> None:
    """Refuse two entries of one kind with the same value of a key."""
    for number, value in enumerate(values, 1):
        first = values.index(value) + 1
        if first != number:
            raise BadTokens(f"[[{kind}]] {number}: its {key} is the same as that of [[{kind}]] {first}")


def lasting(seconds: float) -> str:
    """Return a time before or after now in its largest unit: 45 s, 3 min, 7 h, 12 d."""
    whole = round(abs(seconds))
    size, unit = next((pair for pair in ((86400, "d"), (3600, "h"), (60, "min")) if whole >= pair[0]), (1, "s"))
    return f"{whole // size} {unit}"
