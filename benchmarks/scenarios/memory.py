"""Memory of a wide exact softmax over a million classes: the bytes that a shard needs beyond its rows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.context import Context
from benchmarks.procfs import memory_of
from benchmarks.row import Row, missing
from benchmarks.scenarios.full import ours_of, shape_of
from benchmarks.server import Service
from benchmarks.side import SideFailed

STEPS = 2
SCENARIO, RIVAL = "full-1M-memory", "eager torch"


def full_1m_memory(context: Context) -> list[Row]:
    """Compare a worker's extra memory in a step, its peak minus its memory with the table, with that of eager torch.

    The service keeps nothing between a loss and its step, but computes it again. A step of a tiny table runs first, to
    load what every step loads.
    """
    shape = shape_of(context, 1024, 1_000_000)
    try:
        with context.service(keep_mib=0) as service:
            ours, note = extra_of_worker(context, service, shape)
        with context.side("torch_full", {**shape, "form": "eager", "warm_steps": 0}) as eager:
            eager.step(STEPS)
            rival = eager.memory().extra_bytes
    except SideFailed as error:
        return [missing(SCENARIO, RIVAL, shape, str(error))]
    return [Row(SCENARIO, RIVAL, shape, peak_bytes_ours=ours, peak_bytes_rival=rival, steps=STEPS, note=note)]


def extra_of_worker(context: Context, service: Service, shape: dict[str, Any]) -> tuple[int, str]:
    """Return the largest extra bytes of any worker, and a note on its peak above the table's rows."""
    with context.ours(service, {**ours_of(shape), "N": 4, "V": 1000}) as tiny:
        tiny.ready()
    workers = service.worker_pids()
    if not workers:
        raise SideFailed("no worker process was found among the service's descendants")
    empty = {pid: memory_of(pid, "VmRSS") for pid in workers}
    with context.ours(service, {**ours_of(shape), "warm_steps": 0}) as ours:
        ours.ready()
        made = {pid: memory_of(pid, "VmRSS") for pid in workers}
        for pid in workers:
            forget_peak(pid)
        ours.step(STEPS)
        peaks = {pid: memory_of(pid, "VmHWM") for pid in workers}
    shard_bytes = 4 * shape["D"] * shape["V"] // len(workers)
    above_rows = max(peaks[pid] - empty[pid] - shard_bytes for pid in workers)
    note = f"a worker's peak is {above_rows / 1e6:.0f} MB above its memory without the table plus the table's rows"
    return max(peaks[pid] - made[pid] for pid in workers), note


def forget_peak(pid: int) -> None:
    """Reset VmHWM to the current memory, as filling the table is not part of a step. The kernel may refuse this."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
