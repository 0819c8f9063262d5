"""Who calls, and whether that is enough: from what came with a call to a caller, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from shardloss.errors import PermissionDenied, Unauthenticated

from shardloss_server.access.grants import Grants, Role

SCHEME = "bearer"
Clock = Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: named for messages."""

    name: str
    role: Role


ANYONE = Caller("anyone", Role.ADMIN)


def caller_by_token(authorization: Iterable[str], grants: Grants, clock: Clock = lambda: datetime.now(UTC)) -> Caller:
    """The caller whose token came, as the values of its `authorization` metadata.

    Raises:
        Unauthenticated: no token, an unknown or an expired one; the message says which, and shows none of it.
    """
    token = grants.token(secret_of(list(authorization)))
    if token is None:
        raise Unauthenticated("the token is unknown to this server: was it revoked?", token="unknown")
    if token.expires is not None and token.is_expired(clock()):
        message = f"the token {token.name} expired at {token.expires:%Y-%m-%dT%H:%M:%SZ}: get a new one"
        raise Unauthenticated(message, token="expired")
    return Caller(f"the token {token.name}", token.role)


def secret_of(values: list[str]) -> bytes:
    """The token in `authorization: Bearer TOKEN`.

    Raises:
        Unauthenticated: there is none, or more than one.
    """
    if not values:
        raise Unauthenticated("no token came with this call: connect with a token_file", token="none")
    scheme, _, secret = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != SCHEME or not secret.strip():
        raise Unauthenticated("the call's authorization is no `Bearer TOKEN`, once", token="none")
    return secret.strip().encode()


def caller_by_certificate(names: Iterable[str], grants: Grants) -> Caller:
    """The caller whose certificate came, by its names.

    Raises:
        Unauthenticated: no [[certificate]] entry names it.
    """
    known = sorted(names)
    role = grants.certificate(known)
    if role is None:
        message = "no token came with this call, and the tokens file has no [[certificate]] of the client's names"
        raise Unauthenticated(message, token="none")
    return Caller("the certificate", role)


def refuse_lower(caller: Caller, needed: Role | None, method: str) -> None:
    """Refuse a caller who may not call a method; one that declares no role, nobody may.

    Raises:
        PermissionDenied: names the role that it needs.
    """
    if needed is None:
        raise PermissionDenied(f"{method} declares no role: nobody may call it")
    if caller.role < needed:
        message = f"{method} needs the role {needed.word}; {caller.name} has {caller.role.word}"
        raise PermissionDenied(message, needed_role=needed.word, role=caller.role.word)
