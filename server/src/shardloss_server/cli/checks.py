"""Checks of the settings against this machine, made before anything is started."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardloss.address import MAX_SOCKET_BYTES

from shardloss_server import tracing
from shardloss_server.access import certificates, token_files
from shardloss_server.access.exposure import refuse_exposed
from shardloss_server.access.watched import Unreadable
from shardloss_server.cluster.surroundings import refuse_bad_surroundings
from shardloss_server.config import CannotServe, Listening, Security, Watching, Workers
from shardloss_server.settings import Settings


def check_all(settings: Settings) -> None:
    """Make every check.

    Raises:
        CannotServe: the first failure; the message names the setting.
    """
    for check in CHECKS.values():
        check(settings)


def check_access(settings: Settings) -> None:
    """Check that callers on other machines need credentials, and that their files can be read."""
    security = settings.group(Security)
    refuse_exposed(settings.group(Listening).host, security)
    try:
        if security.tokens_file is not None:
            token_files.watched_grants(security.tokens_file)
        if security.tls_cert_file is not None and security.tls_key_file is not None:
            certificates.read(security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file)
    except Unreadable as error:
        raise CannotServe(str(error)) from None


def check_ports(settings: Settings) -> None:
    """Check that this process can listen on every port."""
    listening, watching = settings.group(Listening), settings.group(Watching)
    wanted = [
        ("host", listening.host, "port", listening.port),
        ("host", listening.host, "admin_port", listening.admin_port),
    ]
    if watching.metrics_port is not None:
        wanted.append(("metrics_host", watching.metrics_host, "metrics_port", watching.metrics_port))
    seen: dict[int, str] = {}
    for host_name, host, name, port in wanted:
        if port and seen.setdefault(port, name) != name:
            raise CannotServe(f"{seen[port]} and {name} are both port {port}: set different ports")
        refuse_unusable(host_name, host, name, port)


def refuse_unusable(host_name: str, host: str, name: str, port: int) -> None:
    """Refuse a port that another process listens on, or an address that is not this machine's."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotServe(f"{host_name} = {host} is not an address: {error.strerror}") from None
    errors = [bind_error(family, address) for family, _, _, _, address in found]
    failed = [error for error in errors if error is not None]
    if errno.EADDRINUSE in failed or len(failed) == len(found):  # "localhost" may have an address that is not set up
        reason = os.strerror(errno.EADDRINUSE if errno.EADDRINUSE in failed else failed[0])
        raise CannotServe(
            f"cannot listen on {host_name} = {host} port {port} ({name}): {reason}. Is another server "
            "using it? Port 0 picks a free one"
        )


def bind_error(family: int, address: Any) -> int | None:
    """Return the errno with which a TCP socket cannot be bound to an address, or None."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: a closed connection is no obstacle
            probe.bind(address)
    except OSError as error:
        return error.errno or 0
    return None


def check_files(settings: Settings) -> None:
    """Check that the Unix socket and the ready file can be created."""
    listening = settings.group(Listening)
    if listening.socket:
        refuse_bad_socket(listening.socket)
    if listening.ready_file is not None:
        refuse_uncreatable("ready_file", listening.ready_file)
        if listening.ready_file.is_dir():
            raise CannotServe(f"ready_file = {listening.ready_file} is a folder: name a file")


def refuse_bad_socket(path: str) -> None:
    """Refuse a path at which no Unix socket can be created, or another server listens."""
    if len(os.fsencode(path)) > MAX_SOCKET_BYTES:
        raise CannotServe(
            f"socket = {path} is too long: the path of a Unix socket has at most {MAX_SOCKET_BYTES} bytes"
        )
    refuse_uncreatable("socket", Path(path))
    if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise CannotServe(f"socket = {path} exists and is not a socket: remove it, or name another path")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise CannotServe(f"socket = {path}: another server is using it")


def refuse_uncreatable(name: str, path: Path) -> None:
    """Refuse a path whose folder does not exist, or in which this user cannot create files."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise CannotServe(f"{name} = {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotServe(f"{name} = {path}: this user cannot create files in {folder}")


def check_workers(settings: Settings) -> None:
    """Check that Ray can be started or joined; threads (local) need nothing."""
    workers = settings.group(Workers)
    if not workers.local:
        refuse_bad_surroundings(workers.ray_address)
    elif workers.ray_address is not None:
        raise CannotServe(f"local and ray_address = {workers.ray_address} are both set: set only one of them")


def check_packages(settings: Settings) -> None:
    """Check that the packages for the chosen settings are installed."""
    tracing.refuse_missing(settings.group(Watching))


CHECKS: Mapping[str, Callable[[Settings], None]] = {
    "access": check_access,
    "ports": check_ports,
    "files": check_files,
    "workers": check_workers,
    "packages": check_packages,
}
