"""Files that are read again when they change; while the new content is invalid, the previous one stays in use."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]
MOST_BYTES = 2**24  # of a file that a person writes; certificates, tokens and settings take kilobytes


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


def content_of(path: Path, what: str) -> bytes:
    """Return the bytes of a file, which `what` describes in the message of an error.

    Raises:
        Unreadable: the file cannot be read or is too large, or is a folder, a device or a pipe, which may never end.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unreadable(f"cannot read {what} {path}: it is not a regular file")
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        raise Unreadable(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MOST_BYTES:
        raise Unreadable(f"cannot read {what} {path}: it is larger than {MOST_BYTES} bytes")
    return content


def text_in(path: Path, what: str) -> str:
    """Return the text of a file.

    Raises:
        Unreadable: the file cannot be read, as in `content_of`, or is not UTF-8 text.
    """
    try:
        return content_of(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"cannot read {what} {path}: byte {error.start} is not UTF-8 text") from None


def warn_where_others_read(path: Path, mask: int, what: str) -> None:
    """Log a warning if a file's mode lets other users read it."""
    try:
        mode = os.stat(path).st_mode & 0o777
    except OSError:
        return  # reading the file reports the error
    if mode & mask:
        log.warning("%s %s has mode %03o, so other users may read it: run chmod 600 on it", what, path, mode)
