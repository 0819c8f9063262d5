"""The temporary folder of a server: its Ray, its token and its sockets, removed together with the processes in it."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "shardloss-"
MARK = "SHARDLOSS_FOLDER"  # environment variable of every process that belongs to a folder
LOCK = "lock"
END_S = 5.0
log = logging.getLogger(__name__)


class OwnFolder:
    """A new folder in TMPDIR that only this user may enter, locked until `remove` or the end of this process.

    Folders whose server ended without removing them are removed first, with the processes that still use them.
    """

    def __init__(self) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        unlocked = self.path / "unlocked"
        self._lock = unlocked.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK)  # only now can another server find it, and it is locked

    def end_processes(self) -> None:
        """Kill the processes that belong to this folder, and wait until they have ended."""
        end_processes(self.path)

    def remove(self) -> None:
        """End the processes that belong to this folder, and remove it. Idempotent."""
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_abandoned() -> None:
    """Remove the folders in TMPDIR that no server holds any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / LOCK).open("r+") as lock:  # another user's, or just removed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)
            log.info("removed %s, which a server that was killed had left", folder)


def end_processes(folder: Path) -> None:
    """Kill the processes that belong to a folder, and wait until they have ended."""
    deadline = time.monotonic() + END_S
    while left := list(processes(folder)):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            log.warning("processes %s do not end", left)
            return
        time.sleep(0.02)


def processes(folder: Path) -> Iterator[int]:
    """Return the ids of the processes that were started with `MARK` set to a folder, except this one."""
    mark = f"{MARK}={folder}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environment.parent.name)
        with suppress(OSError):  # it has ended, or belongs to another user
            if pid != os.getpid() and mark in environment.read_bytes().split(b"\0"):
                yield pid
