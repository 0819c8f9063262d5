"""Export of a table to a file, one page at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardloss import types
from shardloss.client import LossClient
from shardloss.errors import BadFile, BadReply, InvalidArgument, NotSupported, TableMoved
from shardloss.files import npy
from shardloss.files.facts import BIASES, COUNTS, LEARNED, OF_BIASES, OF_WEIGHTS, WEIGHTS, Facts, shapes
from shardloss.files.opening import FORMATS
from shardloss.files.stored import Stored, writing
from shardloss.table import Table
from shardloss.wire import Array

FEATURE = "table_state"  # the feature of a server that reads and writes optimizer state
COUNTS_PAGE = 1 << 16  # number of classes whose counts are sent in one message
Progress = Callable[[int, int], None]  # (rows done, total rows)


def unseen(_done: int, _of: int) -> None:
    """Ignore reports of progress."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export; version and last_version differ if others trained the table during it."""

    path: str
    format: str
    num_rows: int
    num_bytes: int
    version: int
    last_version: int
    num_commits: int


def export_table(
    table: Table,
    path: str | Path,
    *,
    format: str | None = None,
    allow_moving: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a table with its optimizer state, step and class counts to a file, with at most one page in memory.

    format is "safetensors" (one file) or "numpy" (a folder of .npy files); None means safetensors if path ends in
    .safetensors, else numpy. The file is written as path + ".part" and renamed to path once it is complete. All rows
    are of one version; with allow_moving others may train the table during the export, and each page has the rows as
    they were when it was read. progress(rows done, rows) is called after each page.

    Raises:
        TableMoved: others changed the table during the export, and allow_moving is not set; no file is left.
        BadFile: the file exists (unless overwrite), or cannot be written.
        TransientError, RowsLost, TableNotFound: from the server; no file is left.
    """
    path = Path(path)
    kind = format or ("safetensors" if path.suffix == ".safetensors" else "numpy")
    if kind not in FORMATS:
        raise InvalidArgument(f"format = {format!r} must be one of {', '.join(FORMATS)}", field="format")
    refuse_old(table.client)
    table = table.client.table(table.reference)
    first, counts = table.read_state(0, 1), table.read_class_counts(0, 1)
    facts = Facts(table.spec, first.version, first.version, first.num_commits)
    wanted = shapes(table.spec, with_counts=counts.written is not None)
    with new_file(path, overwrite) as part, writing(path):
        tensors = FORMATS[kind].begin(part, wanted, facts)
        facts = write_pages(table, tensors, facts, allow_moving, progress or unseen)
        FORMATS[kind].seal(part, facts)
    num_bytes = sum(shape.num_bytes for shape in wanted.values())
    num_rows = table.spec.num_classes
    return Exported(str(path), kind, num_rows, num_bytes, facts.version, facts.last_version, facts.num_commits)


def refuse_old(client: LossClient) -> None:
    """Refuse a server that would silently leave out the optimizer state.

    Raises:
        NotSupported: the server is too old to read and write optimizer state.
    """
    if FEATURE not in client.info.features:
        raise NotSupported(f"the server ({client.info.version}) lacks the feature {FEATURE}: update it")


def write_pages(
    table: Table, tensors: Mapping[str, Stored], facts: Facts, allow_moving: bool, progress: Progress
) -> Facts:
    """Write every page, and return the facts with the version and commits of the last one."""
    num_rows = table.spec.num_classes
    for start, stop in spans(num_rows, table.page_rows):
        page = table.read_state(start, stop - start)
        facts = stayed(facts, page.version, page.num_commits, allow_moving)
        parts = named(page)
        if parts.keys() != tensors.keys() - {COUNTS, LEARNED}:
            raise BadReply(f"the server sent {sorted(parts)} for the rows of table {table.name!r}")
        for name, values in parts.items():
            tensors[name].write(start, values)
        progress(stop, num_rows)
    for start, stop in spans(num_rows, COUNTS_PAGE) if tensors.keys() & {COUNTS, LEARNED} else ():
        counts = table.read_class_counts(start, stop - start)
        facts = stayed(facts, counts.version, facts.num_commits, allow_moving)
        for name, found in ((COUNTS, counts.written), (LEARNED, counts.learned)):
            if found is not None and name in tensors:
                tensors[name].write(start, found)
    return facts


def spans(num_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the range [start, stop) of every page of size rows."""
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)


def named(page: types.TableRows) -> dict[str, Array]:
    """Return the tensors of a page by their names in a file."""
    found = {WEIGHTS: page.rows} | {OF_WEIGHTS + name: values for name, values in page.weight_state.items()}
    if page.biases is not None:
        found |= {BIASES: page.biases} | {OF_BIASES + name: values for name, values in page.bias_state.items()}
    return found


def stayed(facts: Facts, version: int, num_commits: int, allow_moving: bool) -> Facts:
    """Return the facts with the version and commits of a page.

    Raises:
        TableMoved: the page has a different version, and allow_moving is not set.
    """
    if version != facts.version and not allow_moving:
        raise TableMoved(
            f"table {facts.spec.name!r} changed from version {facts.version} to {version} during the export, so its "
            "rows would be of several versions: stop its trainers, or set allow_moving (--allow-moving)"
        )
    return facts.moved_to(version, num_commits)


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to, and rename it to `path` at the end; on failure, remove it.

    Raises:
        BadFile: `path` exists and is not to be overwritten, or its folder does not exist.
    """
    with writing(path):
        if path.exists() and not overwrite:
            raise BadFile(f"{path} exists: choose another name, or set overwrite (--overwrite)")
        if not path.absolute().parent.is_dir():
            raise BadFile(f"{path.parent} is not a folder: create it first")
        part = path.with_name(path.name + ".part")
        remove(part)
    try:
        yield part
        with writing(path):
            remove(path)
            os.replace(part, path)
    except BaseException:
        remove(part)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder that contains only the NumPy files of an exported table.

    Raises:
        BadFile: the folder contains something else, or the path is a device or a pipe.
    """
    if path.is_dir():
        others = [file.name for file in path.iterdir() if file.suffix != ".npy" and file.name != npy.SPEC_FILE]
        if others:
            raise BadFile(f"{path} contains {others[0]!r}, which is not part of an exported table: choose another name")
        shutil.rmtree(path)
    elif path.exists() and not path.is_file():
        raise BadFile(f"{path} is neither a file nor a folder: choose another name")
    else:
        path.unlink(missing_ok=True)
