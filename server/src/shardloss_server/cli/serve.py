"""The command `serve`: start the workers and the front end, and stop both in order."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from shardloss_server import __version__, logs
from shardloss_server.cli.checks import check_all
from shardloss_server.cli.flags import with_flags
from shardloss_server.config import CannotServe, ServerConfig, Workers
from shardloss_server.machine import num_cores
from shardloss_server.settings import Settings

if TYPE_CHECKING:  # torch and ray take a second to import, and most commands need neither
    from shardloss_server.cluster.folder import OwnFolder
    from shardloss_server.cluster.group import ShardGroup

POLL_S = 0.2
SAY_S = 15.0  # a start that takes longer says so, each time that this many seconds have passed
GRACE_S = 5.0  # in which the group itself can say what has not started
SLOW = "if the machine is slow or busy, raise start_timeout_s"
log = logging.getLogger("shardloss_server")


@with_flags
def serve(settings: Settings) -> None:
    """Start the workers and the front end. SIGTERM or Ctrl-C stops both in order; a second signal exits at once."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else any peer could write arbitrary text to the log
    from shardloss.allocator import keep_freed_memory

    from shardloss_server.cluster.folder import OwnFolder

    config, workers = settings.server(), settings.group(Workers)
    logs.configure(config.watching.log_format, config.watching.log_level)
    stop = threading.Event()
    install_signals(stop, None)
    try:
        check_all(settings)
        if config.listening.ready_file is not None:
            withdraw(config.listening.ready_file)  # of a server that was killed
        folder = None if workers.local else OwnFolder()
    except CannotServe as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    keep_freed_memory(one_arena=True)
    install_signals(stop, folder)
    thread = futures.ThreadPoolExecutor(1, "serve")  # lives as long as Ray's processes, which end with their thread
    status = 1
    try:
        group = started(thread.submit(make_group, workers, folder), workers.start_timeout_s, stop, folder)
        if group is None:
            status = 0
        else:
            serving = thread.submit(run, group, config, stop)
            while not futures.wait([serving], POLL_S).done:
                install_signals(stop, folder)  # Ray resets the handler of SIGTERM at some moment of its end
            status = serving.result()
    except CannotServe as error:
        typer.echo(str(error), err=True)
    finally:
        install_signals(stop, folder)
        if folder is not None:
            folder.remove()
    end(status)


def started(
    starting: futures.Future[ShardGroup], timeout_s: float, stop: threading.Event, folder: OwnFolder | None
) -> ShardGroup | None:
    """Wait until the workers have started; return None if the server is told to stop before.

    Raises:
        CannotServe: they have not started within timeout_s, or cannot start.
    """
    began = time.monotonic()
    said_s = 0.0
    while not futures.wait([starting], POLL_S).done:
        waited_s = time.monotonic() - began
        if stop.is_set():
            log.info("told to stop before the workers had started")
            return None
        if waited_s > timeout_s + GRACE_S:
            raise CannotServe(f"the workers did not start within start_timeout_s = {timeout_s:g} s: {SLOW}")
        if waited_s > said_s + SAY_S:
            said_s = waited_s
            log.info("the workers have been starting for %.0f s, of start_timeout_s = %.0f s", waited_s, timeout_s)
        install_signals(stop, folder)  # Ray replaces the handler of SIGTERM at some moment of its start
    install_signals(stop, folder)
    return starting.result()


def end(status: int) -> NoReturn:
    """Exit, skipping the interpreter's shutdown, which C++ threads of Ray and gRPC could still abort."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal is closed
            stream.flush()
    os._exit(status)


def make_group(workers: Workers, folder: OwnFolder | None = None) -> ShardGroup:
    """Create the shard group; Ray is imported only if it is used, and started before any gRPC thread."""
    import torch

    torch.set_num_threads(1)  # the front end computes little, and the workers need the cores
    kept_bytes = workers.keep_mib * 2**20
    if workers.local:
        from shardloss_server.cluster.local import LocalGroup

        return LocalGroup(workers.workers or num_cores(), kept_bytes)
    from shardloss_server.cluster.ray_group import RayGroup

    return RayGroup(
        workers.workers,
        workers.ray_address,
        links=workers.links,
        num_threads=workers.worker_threads,
        kept_bytes=kept_bytes,
        start_timeout_s=workers.start_timeout_s,
        folder=folder,
    )


def run(group: ShardGroup, config: ServerConfig, stop: threading.Event) -> int:
    """Serve until `stop` is set or the group fails, then close both; return the exit status."""
    from shardloss_server.rpc.serve import Server

    try:
        server = Server(group, config)
        server.start()
        typer.echo(f"shardloss-server {__version__} serves on {server.address} with {', '.join(group.devices)}")
        if server.exposition is not None:
            log.info("metrics on http://%s/metrics", server.exposition.address)
        if config.listening.ready_file is not None:
            announce(config.listening.ready_file, server.address)
        failure = None
        while failure is None and not stop.wait(POLL_S):
            failure = group.failure()
        if failure is not None:
            tables = ", ".join(owner.spec.name for owner in server.catalog.owners()) or "none"
            log.error("%s, so this server stops, to be started again; lost with it: tables %s", failure, tables)
        log.info("stopping: new calls are refused, and calls in flight have %.0f s to finish", config.listening.drain_s)
        server.stop()
    finally:
        group.close()
        if config.listening.ready_file is not None:
            withdraw(config.listening.ready_file)
    return 0 if failure is None else 1


def announce(ready_file: Path, address: str) -> None:
    """Write the server's address to a file atomically.

    Raises:
        CannotServe: the file cannot be written.
    """
    unfinished = ready_file.with_suffix(ready_file.suffix + ".part")
    try:
        unfinished.write_text(address)
        unfinished.rename(ready_file)
    except OSError as error:
        raise CannotServe(f"ready_file = {ready_file} cannot be written: {error.strerror}") from None


def withdraw(ready_file: Path) -> None:
    """Remove the ready file, if it is there.

    Raises:
        CannotServe: it cannot be removed.
    """
    try:
        ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise CannotServe(f"ready_file = {ready_file} cannot be removed: {error.strerror}") from None


def install_signals(stop: threading.Event, folder: OwnFolder | None) -> None:
    """Handle SIGTERM, SIGINT and SIGHUP: the first signal sets `stop`, the second exits at once.

    A SIGHUP that is ignored, as by nohup, stays so.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signal.alarm(0)  # while Ray starts, its own handler runs first, and would abort the process 3 s later
        if stop.is_set():
            if folder is not None:
                folder.remove()
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # the terminal is closed
        signal.signal(signal.SIGHUP, on_signal)
