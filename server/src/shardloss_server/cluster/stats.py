"""The statistics that a worker reports about its process."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardloss_server.machine import Pool, num_cores, pools


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The state of one worker; memory in bytes, of the whole process if several workers share one."""

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
    memory_limit_bytes: int  # of the memory with the least left
    memory_free_bytes: int
    versions: Mapping[str, int]  # lowest version of each table's shards here, by the shards' name of the table


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as its group sees it; stats is None if it did not answer in time."""

    index: int
    device: str
    num_restarts: int
    stats: WorkerStats | None


def of_process(index: int, device: str, kept_bytes: int, num_shards: int, versions: Mapping[str, int]) -> WorkerStats:
    """Return the stats of the calling process and thread."""
    tightest = min(pools_of(device), key=lambda pool: pool.free_bytes)
    return WorkerStats(
        index=index,
        device=device,
        node=platform.node(),
        pid=os.getpid(),
        resident_bytes=resident_bytes(),
        device_bytes=0 if device == "cpu" else torch.cuda.memory_reserved(device),
        kept_bytes=kept_bytes,
        num_threads=torch.get_num_threads(),
        num_cores=num_cores(),
        num_shards=num_shards,
        memory_limit_bytes=tightest.limit_bytes,
        memory_free_bytes=tightest.free_bytes,
        versions=versions,
    )


def pools_of(device: str) -> list[Pool]:
    """Return the memory that tensors on a device of this process are taken from."""
    if device == "cpu":
        return pools()
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return [Pool(str(torch.cuda.get_device_properties(device).uuid), f"the GPU {device}", total, free)]


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
