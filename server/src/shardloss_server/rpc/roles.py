"""The role that each method needs, as declared by its descriptor."""

from __future__ import annotations

from google.protobuf import descriptor_pool
from shardloss.v1 import options_pb2

from shardloss_server.access.grants import Role

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection."  # of every version
_known: dict[str, Role | None] = {}


def is_open(path: str) -> bool:
    """Return True if a method ("/package.Service/Method") needs no credentials, because probes have none."""
    return path.startswith(f"/{HEALTH}/")


def needed_role(path: str) -> Role | None:
    """Return the lowest role that may call a method; None if none is declared, so that every caller is refused."""
    if path in _known:
        return _known[path]
    if path.startswith(f"/{REFLECTION}"):
        return Role.READER
    try:
        method = descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))
    except KeyError:
        return None  # not cached: callers can make up any number of names
    declared: int = method.GetOptions().Extensions[options_pb2.required_role]  # type: ignore[index]
    _known[path] = Role(declared) if declared in list(Role) else None
    return _known[path]
