"""The temporary folder of a server: its Ray, its token and its sockets, removed together with the processes in it."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from shardloss_server.config import CannotServe

PREFIX = "shardloss-"
MARK = "SHARDLOSS_FOLDER"  # environment variable of every process that belongs to a folder
LOCK = "lock-of-shardloss-server"  # a name that no other folder has
END_S = 5.0
log = logging.getLogger(__name__)


class OwnFolder:
    """A new folder in TMPDIR that only this user may enter, locked until `remove` or the end of this process.

    Folders whose server ended without removing them are removed first, with the processes that still use them.

    Raises:
        CannotServe: TMPDIR is full, or its file system has no locks.
    """

    def __init__(self) -> None:
        remove_abandoned()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary()))
            self._lock = self._locked()
        except OSError as error:
            reason = f"TMPDIR = {temporary()} cannot hold this server's folder: {error.strerror}"
            raise CannotServe(f"{reason}. Set TMPDIR to a folder on a local disk with space") from None

    def _locked(self) -> IO[str]:
        unlocked = self.path / "unlocked"
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, self.path, ignore_errors=True)
            lock = undo.enter_context(unlocked.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlocked.rename(self.path / LOCK)  # only now can another server find it, and it is locked
            undo.pop_all()
        return lock

    def end_processes(self) -> None:
        """Kill the processes that belong to this folder, and wait until they have ended."""
        end_processes(self.path)

    def remove(self) -> None:
        """End the processes that belong to this folder, and remove it. Idempotent."""
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def temporary() -> Path:
    """Return TMPDIR as the one path by which processes are marked, whatever links lead to it.

    Raises:
        CannotServe: neither TMPDIR nor a default can be written to.
    """
    try:
        return Path(tempfile.gettempdir()).resolve()
    except FileNotFoundError:
        raise CannotServe("no folder for temporary files can be written to: set TMPDIR to one that can") from None


def remove_abandoned() -> None:
    """Remove this user's folders in TMPDIR that no server holds any more.

    Other users may create anything in TMPDIR: links and folders of theirs are left alone, even by root.
    """
    for folder in temporary().glob(f"{PREFIX}*"):
        with suppress(OSError):  # it has just been removed
            if not is_own(folder, stat.S_ISDIR) or not is_own(folder / LOCK, stat.S_ISREG):
                continue
            remove_unlocked(folder)


def is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return True if a path is of this user and of a kind; a link is neither a folder nor a file.

    Raises:
        OSError: nothing is there.
    """
    found = path.lstat()
    return found.st_uid == os.geteuid() and is_kind(found.st_mode)


def remove_unlocked(folder: Path) -> None:
    """Remove a folder and end the processes in it.

    Raises:
        OSError: a server holds its lock, or it has just been removed.
    """
    with (folder / LOCK).open("r+") as lock:
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
