"""Facts about processes on this machine, read from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """Return VmRSS or VmHWM of a process, in bytes.

    Raises:
        ProcessLookupError: the process no longer exists.
    """
    with suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise ProcessLookupError(f"process {pid} is gone")


def command_of(pid: int) -> bytes:
    """Return the command line of a process, including a title that it set itself; empty if the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def parent_of(pid: int) -> int:
    """Return the id of a process's parent; 0 if the process is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def descendants_of(root: int) -> list[int]:
    """Return the ids of all current descendants of a process."""
    parents = {int(entry.name): parent_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: list[int] = []
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def shared_memory_bytes() -> int:
    """Return the size of all files in /dev/shm, including unlinked ones such as Ray's."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize
