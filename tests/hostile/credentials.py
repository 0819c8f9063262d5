"""Servers that authenticate their callers, and raw calls with arbitrary credentials."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from google.protobuf.descriptor import MethodDescriptor
from shardloss import v1
from shardloss_server.access.grants import ROLES
from shardloss_server.access.token_files import create, init
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import ANY_PORT, Security, ServerConfig
from shardloss_server.rpc.serve import Server

TRY_S = 120.0
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


@contextmanager
def serving(security: Security, host: str = "127.0.0.1", socket: str = "") -> Iterator[Server]:
    """Run a server with these security settings over one worker thread, on free ports."""
    group = LocalGroup(1)
    server = Server(group, ServerConfig(replace(ANY_PORT, host=host, socket=socket), security=security))
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=0.5)
        group.close()


@dataclass(frozen=True)
class Secrets:
    """A folder with a valid and an expired token file per role, and the tokens file that the server reads."""

    folder: Path

    @property
    def tokens_file(self) -> Path:
        return self.folder / "tokens.toml"

    def token(self, name: str) -> str:
        return (self.folder / f"{name}.token").read_text().strip()


def secrets_in(folder: Path) -> Secrets:
    """Create a valid and an expired token for every role in the folder."""
    init(folder)
    for word, role in ROLES.items():
        name = f"expired-{word}"
        past = datetime.now(UTC) - timedelta(days=1)
        create(folder / "tokens.toml", folder / f"{name}.token", name, role, past)
    return Secrets(folder)


def all_methods() -> list[MethodDescriptor]:
    """Return every RPC of every service of every stub; new RPCs are included automatically."""
    modules = [importlib.import_module(f"shardloss.v1.{each.name}") for each in pkgutil.iter_modules(v1.__path__)]
    files = [module.DESCRIPTOR for module in modules if hasattr(module, "DESCRIPTOR")]
    return [method for file in files for service in file.services_by_name.values() for method in service.methods]


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the call metadata that presents a token; empty for None."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def code_of(
    channel: grpc.Channel, path: str, metadata: tuple[tuple[str, str], ...] = (), streams: bool = False
) -> tuple[str, str]:
    """Call an RPC with an empty message and return (status, details)."""
    try:
        if streams:
            list(channel.stream_stream(path)(iter([b""]), timeout=TRY_S, metadata=metadata))
        else:
            channel.unary_unary(path)(b"", timeout=TRY_S, metadata=metadata)
    except grpc.RpcError as failure:
        return failure.code().name, failure.details()
    return "OK", ""


def eventually(holds: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Poll a condition and return True if it becomes true within the time limit."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return holds()
