"""Files that are read again when they change; while the new content is invalid, the previous one stays in use."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]


class Unreadable(Exception):
    """Files that cannot be read or are invalid; the message says which, what was found and what is needed."""


class Watched(Generic[T]):
    """A value that `read` returns for some files, read again when their time, size or inode changes. Thread-safe.

    The files are checked when the value is requested, at most once per interval_s seconds. If a later `read` raises
    Unreadable, the previous value is kept and the reason is logged once.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], interval_s: float) -> None:
        self._paths, self._read, self._interval_s = paths, read, interval_s
        self._looking = threading.Lock()
        self._signature = signature_of(paths)
        self._looked = time.monotonic()
        self._value = read()

    def value(self) -> T:
        """Return the latest valid value."""
        if time.monotonic() - self._looked >= self._interval_s and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._value

    def latest(self) -> T:
        """Check the files now, and return the latest valid value."""
        with self._looking:
            self._look()
        return self._value

    def _look(self) -> None:
        self._looked = time.monotonic()
        signature = signature_of(self._paths)
        if signature == self._signature:
            return
        try:
            value = self._read()
        except Unreadable as error:
            log.error("%s; the previous content stays in use", error)
        else:
            if signature_of(self._paths) != signature:  # the files are being written: the next check reads them
                return
            self._value = value
            log.info("read %s again", ", ".join(str(path) for path in self._paths))
        self._signature = signature


def signature_of(paths: Sequence[Path]) -> Signature:
    """Return a value that changes when a file does, with None for each file that does not exist."""
    return tuple(stamp_of(path) for path in paths)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return a file's modification time, size and inode, or None if it does not exist.

    The client's credentials module has the same function, but importing it would cost each health probe a third of a
    second.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def warn_where_others_read(path: Path, mask: int, what: str) -> None:
    """Log a warning if a file's mode lets other users read it."""
    try:
        mode = os.stat(path).st_mode & 0o777
    except OSError:
        return  # reading the file reports the error
    if mode & mask:
        log.warning("%s %s has mode %03o, so other users may read it: run chmod 600 on it", what, path, mode)
