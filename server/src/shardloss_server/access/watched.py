"""Files that are read again when they change; what was read before holds while the new content is wrong."""

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
    """Files that cannot be read, or are wrong: says which, what was found and what is needed."""


class Watched(Generic[T]):
    """What `read` makes of some files, read again where their time, size or inode changed. Thread-safe.

    They are looked at when the value is asked for, at most once in interval_s. Where `read` raises Unreadable later on,
    the value stays, and the log says why, once.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], interval_s: float) -> None:
        self._paths, self._read, self._interval_s = paths, read, interval_s
        self._looking = threading.Lock()
        self._signature = signature_of(paths)
        self._looked = time.monotonic()
        self._value = read()

    def value(self) -> T:
        """The latest good value."""
        if time.monotonic() - self._looked >= self._interval_s and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._value

    def latest(self) -> T:
        """The good value of this very moment."""
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
            log.error("%s; what was read before still holds", error)
        else:
            if signature_of(self._paths) != signature:  # they are being written: the next look will see
                return
            self._value = value
            log.info("read %s again", ", ".join(str(path) for path in self._paths))
        self._signature = signature


def signature_of(paths: Sequence[Path]) -> Signature:
    """What changes where a file does; None for one that is not there."""
    return tuple(stamp_of(path) for path in paths)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """A file's time of change, size and inode.

    The client's credentials have the same; importing that package would cost each health probe a third of a second.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def warn_where_others_read(path: Path, mask: int, what: str) -> None:
    """Log a file whose mode lets others read it."""
    try:
        mode = os.stat(path).st_mode & 0o777
    except OSError:
        return  # reading it will say so
    if mode & mask:
        log.warning("%s %s has mode %03o: others may read it; chmod 600 it", what, path, mode)
