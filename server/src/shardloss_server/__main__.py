"""shardloss-server: start the workers and the front end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import typer
from shardloss.allocator import keep_freed_memory

from shardloss_server import __version__
from shardloss_server.cluster.group import ShardGroup
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import PortTaken, Server
from shardloss_server.shard.kept import KEPT_BYTES

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Softmax losses over class tables that live here.")
log = logging.getLogger("shardloss_server")


@app.callback()
def main() -> None:
    """Keeps `serve` a subcommand."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def serve(
    workers: Annotated[int, typer.Option(min=1, help="Worker processes: one a GPU, or one a core.")] = 2,
    worker_threads: Annotated[int, typer.Option(min=1, help="Threads that each worker computes with.")] = 1,
    keep_mib: Annotated[
        int, typer.Option(min=0, help="MiB that each worker may keep between a loss and its step; 0: compute anew.")
    ] = KEPT_BYTES // 2**20,
    links: Annotated[bool, typer.Option(help="Workers answer over links; --no-links: as plain Ray calls.")] = True,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Data port; 0 takes a free one.")] = 7070,
    socket: Annotated[str, typer.Option(help="Path of a Unix socket to listen on as well, for unix:PATH.")] = "",
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of health and reflection; 0: free.")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster; default: an embedded Ray.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Shards as threads of this process, without Ray.")] = False,
    ready_file: Annotated[Path | None, typer.Option(help="Write host:port here once serving.")] = None,
    drain_s: Annotated[float, typer.Option(min=0.0, help="Seconds for calls in flight at a stop.")] = 10.0,
) -> None:
    """Start the workers and the front end; SIGTERM and Ctrl-C stop both, a second one at once."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory(one_arena=True)
    config = ServerConfig(host=host, port=port, socket=socket, admin_port=admin_port, drain_s=drain_s)
    stop = threading.Event()
    install_signals(stop)
    # In a thread of its own: on the main one Ray would replace the signal handlers, and its processes end with the
    # thread that started them.
    with futures.ThreadPoolExecutor(1, "serve") as thread:
        try:
            make = partial(make_group, workers, ray_address, local, worker_threads, keep_mib * 2**20, links)
            thread.submit(run, make, config, ready_file, stop).result()
        except PortTaken as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


def make_group(
    workers: int, ray_address: str | None, local: bool, num_threads: int, kept_bytes: int, links: bool
) -> ShardGroup:
    """The shard group; Ray is only imported where it is used, and started before any gRPC thread."""
    torch.set_num_threads(1)  # the front end's own work is small, and the cores are the workers'
    if local:
        from shardloss_server.cluster.local import LocalGroup

        return LocalGroup(workers, kept_bytes)
    from shardloss_server.cluster.ray_group import RayGroup

    return RayGroup(workers, ray_address, links=links, num_threads=num_threads, kept_bytes=kept_bytes)


def run(make: Callable[[], ShardGroup], config: ServerConfig, ready_file: Path | None, stop: threading.Event) -> None:
    """Start the workers and serve until told to stop; then both are gone."""
    group = make()
    try:
        server = Server(group, config)
        server.start()
        typer.echo(f"shardloss-server {__version__} serves on {server.address} with {', '.join(group.devices)}")
        if ready_file is not None:
            unfinished = ready_file.with_suffix(ready_file.suffix + ".part")
            unfinished.write_text(server.address)
            unfinished.rename(ready_file)
        stop.wait()
        log.info("stopping: no new calls, those in flight have %.0f s", config.drain_s)
        server.stop()
    finally:
        group.close()


def install_signals(stop: threading.Event) -> None:
    """First signal: drain. Second: exit now."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


if __name__ == "__main__":
    app()
