"""The command `serve`: start the workers and the front end, and stop both in order."""

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

if TYPE_CHECKING:  # torch and ray take a second to import, and most commands need neither
    from shardloss_server.cluster.group import ShardGroup

log = logging.getLogger("shardloss_server")


@with_flags
def serve(settings: Settings) -> None:
    """Start the workers and the front end. SIGTERM or Ctrl-C stops both in order; a second signal exits at once."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else any peer could write arbitrary text to the log
    from shardloss.allocator import keep_freed_memory

    from shardloss_server.access.exposure import refuse_exposed

    config = settings.server()
    logs.configure(config.watching.log_format, config.watching.log_level)
    keep_freed_memory(one_arena=True)
    stop = threading.Event()
    install_signals(stop)
    # Ray runs in a thread of its own: on the main thread it would replace the signal handlers. Its processes end with
    # the thread that started them.
    with futures.ThreadPoolExecutor(1, "serve") as thread:
        try:
            refuse_exposed(config.listening.host, config.security)  # before any worker is started
            tracing.refuse_missing(config.watching)
            thread.submit(run, partial(make_group, settings.group(Workers)), config, stop).result()
        except CannotServe as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
    end()


def end() -> NoReturn:
    """Exit with 0, skipping the interpreter's shutdown, which C++ threads of Ray and gRPC could still abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def make_group(workers: Workers) -> ShardGroup:
    """Create the shard group; Ray is imported only if it is used, and started before any gRPC thread."""
    import torch

    torch.set_num_threads(1)  # the front end computes little, and the workers need the cores
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
    """Start the workers and serve until `stop` is set, then close both."""
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
        log.info("stopping: new calls are refused, and calls in flight have %.0f s to finish", config.listening.drain_s)
        server.stop()
    finally:
        group.close()


def announce(ready_file: Path, address: str) -> None:
    """Write the server's address to a file atomically."""
    unfinished = ready_file.with_suffix(ready_file.suffix + ".part")
    unfinished.write_text(address)
    unfinished.rename(ready_file)


def install_signals(stop: threading.Event) -> None:
    """Handle SIGTERM and SIGINT: the first signal sets `stop`, the second exits at once."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
