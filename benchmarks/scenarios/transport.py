"""Hidden sent and its gradient returned through the service, against one plain gRPC call and a bare Unix socket."""

from __future__ import annotations

from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.scenarios.against import KEEP_FREED_MEMORY
from benchmarks.side import SideFailed

SIZES = {
    "0.13 MB": 1 << 17,
    "0.52 MB": 1 << 19,
    "2.1 MB": 1 << 21,
    "4.2 MB": 1 << 22,
    "8.4 MB": 1 << 23,
    "16.8 MB": 1 << 24,
}
DIM = 1024
QUICK_SIZES = WITHOUT_WORKERS = ("2.1 MB",)
RIVALS = {"unary call": "grpc_echo", "bare Unix socket": "unix_echo"}
WHOLE = "ours is a ComputeLoss over 2 classes: it includes validation and a fan-out to one worker, and computes little"
SOCKET = "ours without Ray: its only shard is a thread of the front end"
LEG = "not the service: the rival's own call, with the allocator settings of our client and server"


def transport(context: Context) -> list[Row]:
    """Compare each size with each rival and with the wire alone, and one size without a worker process."""
    rows: list[Row] = []
    for size in QUICK_SIZES if context.quick else SIZES:
        with context.service() as service:
            rows += echoes(context, size, {"address": service.address}, "", WHOLE)
        rows.append(settings_alone(context, size))
        if size in WITHOUT_WORKERS:
            rows += echoes(context, size, {"local": True}, ", no worker process", SOCKET)
    return rows


def settings_alone(context: Context, size: str) -> Row:
    """Compare the plain call with our allocator settings to itself without them."""
    shape = {"bytes": SIZES[size]}
    name = f"unary call, {size}, settings alone"
    try:
        with context.side("grpc_echo", shape, variables=KEEP_FREED_MEMORY) as tuned:
            return context.row("transport", name, shape, tuned, context.side("grpc_echo", shape), note=LEG)
    except SideFailed as error:
        return missing("transport", name, shape, str(error))


def echoes(context: Context, size: str, where: dict[str, Any], suffix: str, note: str) -> list[Row]:
    """Compare one size with both rivals."""
    shape = {"bytes": SIZES[size], "N": SIZES[size] // (4 * DIM), "D": DIM, "V": 2, "K": 1, "dtype": "float32"}
    names = {f"{rival}, {size}{suffix}": module for rival, module in RIVALS.items()}
    variables = KEEP_FREED_MEMORY if "local" in where else None  # if local, the front end is a child of the trainer
    try:
        with context.side("ours_echo", {**shape, **where}, threads=1, variables=variables) as ours:
            ours.ready()
            return [
                context.row("transport", name, shape, ours, context.side(module, shape), note=note)
                for name, module in names.items()
            ]
    except SideFailed as error:
        return [missing("transport", name, shape, str(error)) for name in names]
