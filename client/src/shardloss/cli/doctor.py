"""`shardloss doctor`: a diagnosis of this set-up."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from shardloss import LossClient, __version__
from shardloss.address import problem, socket_path
from shardloss.cli.checks import CHECKS, Answer, Disk, Facts, Finding, Port, Verdict
from shardloss.cli.connection import Connection
from shardloss.cli.invocation import Invocation, command
from shardloss.cli.output import grid
from shardloss.errors import PermissionDenied, ShardlossError
from shardloss.status import ServerStatus

ANSWER_S = 3.0  # time that a server has to answer
SHARED_MEMORY = "/dev/shm"


@command
def doctor(
    call: Invocation,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT that a server will listen on; may be repeated. Default: --address and --admin-address."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(exists=True, help="A folder whose disk is also checked, such as one for exported tables."),
    ] = None,
) -> None:
    """Check this set-up and say how to fix what is wrong. The exit code is 1 if something is."""
    for address in listen or []:
        if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
            raise typer.BadParameter(f"{address!r} is not HOST:PORT", param_hint="--listen")
    facts = gathered(call.connection, listen or [], data_dir)
    findings = [check(facts) for check in CHECKS]
    wrong = [finding for finding in findings if finding.verdict is Verdict.WRONG]
    call.emit({"ok": not wrong, "findings": findings}, lambda: shown(findings))
    if wrong:
        raise typer.Exit(1)


def shown(findings: list[Finding]) -> RenderableType:
    """Format findings as text."""
    marks = {Verdict.OK: "ok", Verdict.WRONG: "WRONG", Verdict.SKIPPED: "-"}
    rows = [(each.check, marks[each.verdict], each.found + (f"\n-> {each.do}" if each.do else "")) for each in findings]
    return grid(("check", "", "found"), rows)


@dataclass(frozen=True, slots=True)
class Look:
    """The answers of both ports, the server's status or the reason why there is none, and the offset of its clock.

    The offset is the server's clock minus this machine's, in seconds, with the error of that difference.
    """

    answers: list[Answer]
    status: ServerStatus | None
    clock_s: float
    error_s: float


def gathered(connection: Connection, listen: list[str], data_dir: Path | None) -> Facts:
    """Gather the facts about this machine and the server."""
    look = looked_at(connection)
    answered = {answer.address: answer.is_there for answer in look.answers}
    ports = [port_at(each) for each in listen] or [port_at(each, is_ours=ours) for each, ours in answered.items()]
    ray_dir = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    ray_dir = next(folder for folder in (ray_dir, *ray_dir.parents) if folder.exists())  # Ray creates missing folders
    folders = [("Ray's folder", str(ray_dir))] + ([("data_dir", str(data_dir))] if data_dir else [])
    return Facts(
        answers=look.answers,
        ports=[port for port in ports if port is not None],
        token_file=str(connection.token_file or ""),
        token_mode=mode_of(connection.token_file),
        shm=disk_at("/dev/shm", SHARED_MEMORY),
        disks=[disk for what, path in folders if (disk := disk_at(what, path)) is not None],
        num_cores=len(os.sched_getaffinity(0)),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        client_version=__version__,
        protobuf_version=metadata.version("protobuf"),
        status=look.status,
        clock_s=look.clock_s,
        clock_error_s=look.error_s,
    )


def looked_at(connection: Connection) -> Look:
    """Call both ports; the clock difference is known to within half of the round trip."""
    seen: list[tuple[float, ServerStatus, float]] = []
    data = answer_of(connection, False, lambda client: client.list_tables())
    admin = answer_of(connection, True, lambda client: seen.append((time.time(), client.status(), time.time())))
    if not seen:
        return Look([data, admin], None, 0.0, 0.0)
    before, status, after = seen[0]
    return Look([data, admin], status, status.time_s - (before + after) / 2, (after - before) / 2)


def answer_of(connection: Connection, admin: bool, call: Callable[[LossClient], object]) -> Answer:
    """Return what one of the server's ports answers to a call."""
    what, address = ("admin port", connection.admin_address) if admin else ("data port", connection.address)
    if problem(address) is None and nobody_listens(address):
        return Answer(what, address, is_there=False)
    try:
        with connection.connect(admin=admin, timeout_s=ANSWER_S) as client:
            call(client)
    except PermissionDenied as error:  # the server knows the caller, who may do other things
        return Answer(what, address, is_there=True, refusal=f"{error.reason}: {error.message}")
    except ShardlossError as error:
        return Answer(what, address, is_there=None, wrong=f"{error.reason}: {error.message}")
    return Answer(what, address, is_there=True)


def nobody_listens(address: str) -> bool:
    """Return True if the address belongs to this machine and is free."""
    if address.startswith("unix:"):
        return not os.path.exists(socket_path(address))
    port = port_at(address)
    return port is not None and port.is_free


def port_at(address: str, *, is_ours: bool | None = False) -> Port | None:
    """Return the port and whether this machine can listen on it; None if the address is not this machine's."""
    host, _, number = address.rpartition(":")
    if not number.isdigit() or address.startswith("unix:"):
        return None
    if is_ours:
        return Port(address, is_free=False, is_ours=True)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended is free
        try:
            probe.bind((host.strip("[]"), int(number)))
        except (OSError, OverflowError) as error:
            return (
                Port(address, is_free=False, is_ours=is_ours)
                if getattr(error, "errno", 0) == errno.EADDRINUSE
                else None
            )
    return Port(address, is_free=True)


def mode_of(path: Path | None) -> int | None:
    """Return the mode of a file; None if no file is given, -1 if it does not exist."""
    if path is None:
        return None
    with suppress(OSError):
        return path.stat().st_mode
    return -1


def disk_at(what: str, path: str) -> Disk | None:
    """Return the file system of a folder; None if the folder does not exist."""
    try:
        room = os.statvfs(path)
    except OSError:
        return None
    return Disk(what, path, room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize)
