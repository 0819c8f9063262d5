"""A tensor inside a file, read and written in place a few rows at a time."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardloss.errors import BadFile
from shardloss.wire import Array

# bfloat16 has no NumPy dtype: uint16 holds its bits.
STORAGE: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The dtype and sizes of a tensor; dtype is a key of STORAGE, or the file's own code of one that is not read."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all elements in bytes; dtype must be in STORAGE."""
        return math.prod(self.sizes) * STORAGE[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.sizes)}"


@dataclass(frozen=True, slots=True)
class Stored:
    """A row-major tensor in a file, which begins at the byte `offset`."""

    path: Path
    name: str
    shape: Shape
    offset: int

    @property
    def num_rows(self) -> int:
        """The number of rows, which is the first dimension of the tensor."""
        return self.shape.sizes[0]

    def read(self, start: int, stop: int) -> Array:
        """Return those of the rows [start, stop) that exist; bfloat16 is returned as uint16.

        Raises:
            BadFile: the file cannot be read, was truncated after it was opened, or has a dtype that is not read.
        """
        if self.shape.dtype not in STORAGE:
            raise BadFile(f"{self.path}: {self.name!r} is {self.shape}; only {', '.join(STORAGE)} are read")
        storage, width = STORAGE[self.shape.dtype], math.prod(self.shape.sizes[1:])
        count = width * max(0, min(stop, self.num_rows) - start)
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.offset + start * width * storage.itemsize)
            found = np.fromfile(file, storage, count)
        if len(found) != count:
            raise BadFile(
                f"{self.path}: {self.name} ends before row {stop}: the file was truncated after it was opened"
            )
        return found.reshape(-1, *self.shape.sizes[1:])

    def write(self, start: int, rows: Array) -> None:
        """Overwrite the rows starting at `start`."""
        storage, width = STORAGE[self.shape.dtype], math.prod(self.shape.sizes[1:])
        if rows.dtype != storage or rows.shape[1:] != self.shape.sizes[1:] or start + len(rows) > self.num_rows:
            raise BadFile(
                f"{self.path}: {rows.dtype} {list(rows.shape)} does not fit {self.name}, which is {self.shape}"
            )
        with self.path.open("r+b") as file:
            file.seek(self.offset + start * width * storage.itemsize)
            file.write(np.ascontiguousarray(rows).data)


def reserve(path: Path, num_bytes: int) -> None:
    """Allocate the full size of a file now, so that a full disk is reported before hours of work.

    Raises:
        BadFile: the file system has too little free space.
    """
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        room = os.statvfs(path.parent)
        raise BadFile(
            f"{path} takes {num_bytes} bytes, but its file system has {room.f_bavail * room.f_frsize} free: "
            "free some space, or choose another folder"
        ) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` while a file is read into `BadFile`."""
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it.

    Raises:
        BadFile: it cannot be read, or is a pipe or a device, which may never end.
    """
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(f"{path} is not a regular file")
        with path.open("rb") as file:
            yield file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` while a file is written into `BadFile`."""
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None
