"""`serve`: start the workers and the front end, and stop both in order."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from shardloss_server import __version__, logs, tracing
from shardloss_server.cli.flags import with_flags
from shardloss_server.config import CannotServe, ServerConfig, Workers
from shardloss_server.settings import Settings

if TYPE_CHECKING:  # torch and ray take a second to import: commands that need neither answer at once
    from shardloss_server.cluster.group import ShardGroup

log = logging.getLogger("shardloss_server")


@with_flags
def serve(settings: Settings) -> None:
    """Start the workers and the front end; SIGTERM and Ctrl-C stop both, a second one at once."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else whoever connects writes what he likes into the log
    from shardloss.allocator import keep_freed_memory

    from shardloss_server.access.exposure import refuse_exposed

    config = settings.server()
    logs.configure(config.watching.log_format, config.watching.log_level)
    keep_freed_memory(one_arena=True)
    stop = threading.Event()
    install_signals(stop)
    # In a thread of its own: on the main one Ray would replace the signal handlers, and its processes end with the
    # thread that started them.
    with futures.ThreadPoolExecutor(1, "serve") as thread:
        try:
            refuse_exposed(config.listening.host, config.security)  # before workers are started for nothing
            tracing.refuse_missing(config.watching)
            thread.submit(run, partial(make_group, settings.group(Workers)), config, stop).result()
        except CannotServe as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
    end()


def end() -> NoReturn:
    """Leave with 0: all is closed, but at the interpreter's own end C++ threads of Ray and gRPC may yet abort it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def make_group(workers: Workers) -> ShardGroup:
    """The shard group; Ray is only imported where it is used, and started before any gRPC thread."""
    import torch

    torch.set_num_threads(1)  # the front end's own work is small, and the cores are the workers'
    kept_bytes = workers.keep_mib * 2**20
    if workers.local:
        from shardloss_server.cluster.local import LocalGroup

        return LocalGroup(workers.workers or os.cpu_count() or 1, kept_bytes)
    from shardloss_server.cluster.ray_group import RayGroup

    return RayGroup(
        workers.workers,
        workers.ray_address,
        links=workers.links,
        num_threads=workers.worker_threads,
        kept_bytes=kept_bytes,
    )


def run(make: Callable[[], ShardGroup], config: ServerConfig, stop: threading.Event) -> None:
    """Start the workers and serve until told to stop; then both are gone."""
    from shardloss_server.rpc.serve import Server

    group = make()
    try:
        server = Server(group, config)
        server.start()
        typer.echo(f"shardloss-server {__version__} serves on {server.address} with {', '.join(group.devices)}")
        if server.exposition is not None:
            log.info("metrics on http://%s/metrics", server.exposition.address)
        if config.listening.ready_file is not None:
            announce(config.listening.ready_file, server.address)
        stop.wait()
        log.info("stopping: no new calls, those in flight have %.0f s", config.listening.drain_s)
        server.stop()
    finally:
        group.close()


def announce(ready_file: Path, address: str) -> None:
    """Write the address, whole or not at all."""
    unfinished = ready_file.with_suffix(ready_file.suffix + ".part")
    unfinished.write_text(address)
    unfinished.rename(ready_file)


def install_signals(stop: threading.Event) -> None:
    """First signal: drain. Second: exit now."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
