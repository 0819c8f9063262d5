"""Authentication and authorisation of a call: from its credentials to a caller, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from shardloss.errors import PermissionDenied, Unauthenticated

from shardloss_server.access.grants import Grants, Role, lasting

SCHEME = "bearer"
Clock = Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of an RPC: its role, and its name for messages."""

    name: str
    role: Role


ANYONE = Caller("anyone", Role.ADMIN)


def caller_by_token(authorization: Iterable[str], grants: Grants, clock: Clock = lambda: datetime.now(UTC)) -> Caller:
    """Return the caller whose token is in the values of a call's `authorization` metadata.

    Raises:
        Unauthenticated: the token is missing, unknown or expired; the message says which, and never quotes the token.
    """
    token = grants.token(secret_of(list(authorization)))
    if token is None:
        raise Unauthenticated("the token is unknown to this server: was it revoked?", token="unknown")
    if token.expires is not None and token.is_expired(now := clock()):
        ago = lasting((now - token.expires).total_seconds())
        message = f"the token {token.name} expired at {token.expires:%Y-%m-%dT%H:%M:%SZ}, {ago} ago: get a new one"
        raise Unauthenticated(message, token="expired")
    return Caller(f"the token {token.name}", token.role)


def secret_of(values: list[str]) -> bytes:
    """Return the token of `authorization: Bearer TOKEN`.

    Raises:
        Unauthenticated: there is no token, or more than one.
    """
    if not values:
        raise Unauthenticated("the call has no token: connect with a token_file", token="none")
    scheme, _, secret = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != SCHEME or not secret.strip():
        raise Unauthenticated("the call's authorization must be `Bearer TOKEN`, exactly once", token="none")
    return secret.strip().encode()


def caller_by_certificate(names: Iterable[str], grants: Grants) -> Caller:
    """Return the caller of a client certificate with these names.

    Raises:
        Unauthenticated: no [[certificate]] entry has one of the names.
    """
    known = sorted(names)
    role = grants.certificate(known)
    if role is None:
        message = "the call has no token, and the tokens file has no [[certificate]] entry for the client's names"
        raise Unauthenticated(message, token="none")
    return Caller("the certificate", role)


def refuse_lower(caller: Caller, needed: Role | None, method: str) -> None:
    """Refuse a caller whose role is too low for a method; a method without a declared role is refused to everyone.

    Raises:
        PermissionDenied: the message names the role that the method needs.
    """
    if needed is None:
        raise PermissionDenied(f"{method} declares no role, so it is refused to everyone")
    if caller.role < needed:
        message = f"{method} needs the role {needed.word}; {caller.name} has {caller.role.word}"
        raise PermissionDenied(message, needed_role=needed.word, role=caller.role.word)
