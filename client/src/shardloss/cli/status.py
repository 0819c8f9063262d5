"""`shardloss status`: the state of a server, its workers and its tables, once or at regular intervals."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from shardloss.cli.invocation import Invocation, command
from shardloss.cli.output import Output, Size, grid, plain, screen
from shardloss.status import ServerStatus


@command
def status(
    call: Invocation,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes.")] = 1.0,
) -> None:
    """Show the server's workers, tables, calls, latencies and memory. With --watch and JSON, one object per line."""
    with call.connection.connect(admin=True) as client:
        if not watch:
            seen = client.status()
            call.emit(seen, lambda: shown(seen))
            return
        try:
            if call.output is Output.JSON:
                while True:
                    typer.echo(json.dumps(plain(client.status())))
                    time.sleep(interval_s)
            with Live(shown(client.status()), console=screen(), screen=False, auto_refresh=False) as live:
                while True:
                    time.sleep(interval_s)
                    live.update(shown(client.status()), refresh=True)
        except KeyboardInterrupt:
            return


def shown(seen: ServerStatus) -> RenderableType:
    """Format a status as text."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(seen.versions.items()))
    num_up = sum(worker.up for worker in seen.workers)
    shm = (
        f", {Size(seen.shm_free_bytes)} of {Size(seen.shm_total_bytes)} free in /dev/shm"
        if seen.shm_total_bytes
        else ""
    )
    head = f"up {lasting(seen.uptime_s)}, {num_up} of {seen.num_workers} workers, {seen.num_refused} calls refused{shm}"
    return Group(versions, head, "", workers(seen), "", tables(seen), "", places(seen), "", methods(seen))


def workers(seen: ServerStatus) -> RenderableType:
    """Format the workers, one per line."""
    columns = (
        "worker",
        "",
        "device",
        "node",
        "pid",
        "restarts",
        "memory",
        "free for tables",
        "device memory",
        "kept",
        "threads",
        "shards",
    )
    rows = [
        (
            str(one.index),
            "up" if one.up else "DOWN",
            one.device,
            one.node or "-",
            str(one.pid) if one.up else "-",
            one.num_restarts,
            Size(one.resident_bytes) if one.up else "-",
            f"{Size(one.memory_free_bytes)} of {Size(one.memory_limit_bytes)}" if one.up else "-",
            *(Size(size) if one.up else "-" for size in (one.device_bytes, one.kept_bytes)),
            *(count if one.up else "-" for count in (one.num_threads, one.num_shards)),
        )
        for one in seen.workers
    ]
    return grid(columns, rows)


def tables(seen: ServerStatus) -> RenderableType:
    """Format the tables, one per line."""
    columns = ("table", "", "classes", "dim", "dtype", "shards", "version", "commits", "sessions", "tickets", "size")
    rows = [
        (
            one.name,
            "ROWS LOST" if one.rows_lost else "" if one.filled == 1 else f"creating {one.filled:.0%}",
            one.num_classes,
            one.dim,
            one.dtype,
            one.num_shards,
            one.version,
            one.num_commits,
            one.num_sessions,
            one.num_open_tickets,
            Size(one.num_bytes),
        )
        for one in seen.tables
    ]
    return grid(columns, rows) if rows else "no tables"


def places(seen: ServerStatus) -> RenderableType:
    """Format the calls in flight and their limits, one kind of places per line."""
    rows = [(one.name, one.num_calls, one.max_calls, Size(one.num_bytes), Size(one.max_bytes)) for one in seen.places]
    return grid(("in flight", "now", "at most", "bytes", "at most"), rows)


def methods(seen: ServerStatus) -> RenderableType:
    """Format the methods with their calls, errors and latencies, one per line."""
    rows = [
        (
            one.name,
            one.num_calls,
            ", ".join(f"{reason} {count}" for reason, count in sorted(one.errors.items())),
            f"{one.rate:.1f}/s",
            *(f"{1e3 * seconds:.1f} ms" if one.rate else "-" for seconds in (one.median_s, one.p90_s, one.p99_s)),
        )
        for one in seen.methods
    ]
    return grid(("method", "calls", "errors", "last minute", "median", "90%", "99%"), rows)


def lasting(seconds: float) -> str:
    """Format a time in its two largest units: 2 d 3 h, 4 min 5 s."""
    whole = int(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {small}"
    return f"{whole} s"
