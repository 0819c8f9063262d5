"""What a worker says of its process."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker at this moment; bytes of memory, of its whole process where workers are threads of one."""

    index: int
    device: str
    node: str
    pid: int
    resident_bytes: int
    device_bytes: int
    kept_bytes: int
    num_threads: int
    num_cores: int
    num_shards: int
    versions: Mapping[str, int]  # of each table, by the shards' name of it: the lowest of its shards here


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as its group sees it: stats is None where it did not answer in time."""

    index: int
    device: str
    num_restarts: int
    stats: WorkerStats | None


def of_process(index: int, device: str, kept_bytes: int, num_shards: int, versions: Mapping[str, int]) -> WorkerStats:
    """Stats of the process and the thread that this is called in."""
    return WorkerStats(
        index=index,
        device=device,
        node=platform.node(),
        pid=os.getpid(),
        resident_bytes=resident_bytes(),
        device_bytes=0 if device == "cpu" else torch.cuda.memory_reserved(device),
        kept_bytes=kept_bytes,
        num_threads=torch.get_num_threads(),
        num_cores=len(os.sched_getaffinity(0)),
        num_shards=num_shards,
        versions=versions,
    )


def resident_bytes() -> int:
    """Memory that this process has in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
