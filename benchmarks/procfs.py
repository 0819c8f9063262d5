"""What /proc says of processes on this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """VmRSS or VmHWM of a process, in bytes.

    Raises:
        ProcessLookupError: there is no such process any more.
    """
    with suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise ProcessLookupError(f"process {pid} is gone")


def command_of(pid: int) -> bytes:
    """The command line of a process, with the title it gave itself; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def parent_of(pid: int) -> int:
    """The parent's id; 0 where the process is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def descendants_of(root: int) -> list[int]:
    """Every process below one, as /proc shows them now."""
    parents = {int(entry.name): parent_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: list[int] = []
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def shared_memory_bytes() -> int:
    """What all files in /dev/shm hold, those too that have no name any more, as Ray's."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize
