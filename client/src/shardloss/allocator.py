"""Settings of the glibc allocator for a process that sends or receives large messages."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def return_freed_memory() -> None:
    """Make glibc return all freed memory to the kernel now; on another libc, and for a GPU's memory, do nothing."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(one_arena: bool = False) -> bool:
    """Make glibc keep large freed blocks so that the next message does not page-fault; return False on another libc.

    This reduced the echo of a 2 MB message from 13.6 to 4.4 ms (docs/performance.md, "Optimizations"). With one_arena,
    threads that have not allocated yet share the main arena, because a thread's own arena would return freed blocks to
    the kernel despite these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = bool(mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return kept and (not one_arena or bool(mallopt(M_ARENA_MAX, 1)))
