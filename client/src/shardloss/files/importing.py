"""Import of a table from a file, one page at a time; the table gets its name once it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import numpy as np

from shardloss import types
from shardloss.client import LossClient
from shardloss.errors import (
    BadFile,
    InvalidArgument,
    LimitExceeded,
    NotSupported,
    ShardlossError,
    TableExists,
)
from shardloss.files.exporting import COUNTS_PAGE, Progress, refuse_old, spans, unseen
from shardloss.files.facts import BIASES, COUNTS, LEARNED, OF_BIASES, OF_WEIGHTS, WEIGHTS
from shardloss.files.opening import Opened, open_file
from shardloss.files.stored import Stored
from shardloss.table import Table
from shardloss.wire import Array

PART = ".part"  # suffix of the name of a table that is not complete yet
FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Source:
    """The content of a new table: its tensors by their names in a file, its spec, and its step (None: 0)."""

    tensors: dict[str, Stored]
    spec: types.TableInfo
    num_commits: int | None


def import_table(
    client: LossClient,
    path: str | Path,
    name: str,
    *,
    num_shards: int = 0,
    placement: str | None = None,
    weights_name: str | None = None,
    biases_name: str | None = None,
    dtype: str | None = None,
    bias: bool | None = None,
    optimizer: types.Optimizer | None = None,
    count_labels: bool = False,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Table:
    """Create a table from a file, with at most one page in memory.

    A table that `export_table` wrote continues training as the original would have, with any num_shards (0: one per
    worker) and placement (None: the file's). From any other safetensors file, from a sharded checkpoint (its
    model.safetensors.index.json), or from a folder with one of these, the rows are the tensor weights_name [V, D] and
    the biases are biases_name [V]; from a .npy file, the rows are its one array. In all these cases dtype (None: the
    file's, or float32 for float16), bias (None: True if biases_name is given), optimizer and count_labels describe the
    new table.

    The table is called name + ".part" until all of it is written. If the import is interrupted, that table remains;
    import again with resume=True to recreate it from scratch. A table that the server refuses is deleted.

    With replace=True an existing table of that name, also one that has lost rows, stays as it is until then, and is
    deleted in the moment in which the new one gets the name; if the import fails, it is kept. Both must fit in memory,
    except that a table that has lost rows takes none. Sessions and heads of the old table end with it.

    Raises:
        BadFile: the file is truncated, mis-shaped, inconsistent or of another format; no table is created.
        TableExists: the name is in use (set replace), or an earlier import to it was interrupted (set resume, or delete
            NAME.part).
        InvalidArgument, LimitExceeded: the server refuses the table or a row; no table is left.
        TransientError, ServiceError: the import was interrupted; the message says what to do.
    """
    refuse_old(client)
    opened = open_file(path)
    asked = (weights_name, biases_name, dtype, bias, optimizer, count_labels or None)
    if opened.facts is not None and weights_name is None:
        if any(option is not None for option in asked):
            raise InvalidArgument(
                f"{path} describes its table: to set other options, import its rows alone (--weights-name weights)"
            )
        source = Source(dict(opened.tensors), opened.facts.spec, opened.facts.num_commits)
    else:
        plain = rows_alone(opened, weights_name, biases_name, dtype, bias)
        source = changed(plain, spec=changed(plain.spec, optimizer=optimizer or types.Sgd(), count_labels=count_labels))
    spec = changed(source.spec, num_shards=num_shards, placement=placement or source.spec.placement)
    refuse_taken(client, name, resume, replace)
    table = made(client, name + PART, spec)
    with explained(table, name):
        fill(table, source, progress or unseen)
        return client.rename_table(table.reference, name, replace=replace)


def rows_alone(
    opened: Opened, weights_name: str | None, biases_name: str | None, dtype: str | None, bias: bool | None
) -> Source:
    """Return the rows and biases of a file as a source, ignoring any description of its table."""
    weights = opened.tensor(weights_name or WEIGHTS, "rows (--weights-name)", 2)
    tensors = {WEIGHTS: weights}
    num_classes, dim = weights.shape.sizes
    if biases_name is not None:
        tensors[BIASES] = opened.tensor(biases_name, "biases (--biases-name)", 1)
        if tensors[BIASES].num_rows != num_classes:
            raise BadFile(f"{opened.path}: {biases_name} is {tensors[BIASES].shape}, but there are {num_classes} rows")
    for stored in tensors.values():
        if stored.shape.dtype not in FLOATS:
            raise BadFile(
                f"{opened.path}: {stored.name} is {stored.shape}; its dtype must be one of {', '.join(FLOATS)}"
            )
    own = "float32" if weights.shape.dtype == "float16" else weights.shape.dtype
    spec = types.TableInfo(
        name="",
        num_classes=num_classes,
        dim=dim,
        dtype=dtype or own,
        bias=biases_name is not None if bias is None else bias,
        num_shards=0,
        placement="mod",
        initializer=types.Zeros(),
        optimizer=types.Sgd(),
        count_labels=False,
        version=0,
        num_commits=0,
        num_open_tickets=0,
    )
    return Source(tensors, spec, None)


def refuse_taken(client: LossClient, name: str, resume: bool, replace: bool) -> None:
    """Refuse a name in use unless replace is set; with resume, delete the incomplete table that an earlier import left.

    Raises:
        TableExists: a table has the name, or there is an incomplete one and resume is not set.
    """
    existing = found(client, name)
    if existing is not None and not replace:
        lost = " and has lost its rows" if existing.state == "rows_lost" else ""
        raise TableExists(
            f"table {name!r} already exists{lost}: delete it, replace it (--replace), or import under another name",
            field="name",
        )
    if found(client, name + PART) is None:
        return
    if not resume:
        raise TableExists(
            f"an import of {name!r} is in progress or was interrupted: restart it with resume (--resume), or delete "
            f"table {name + PART!r}",
            field="name",
        )
    client.delete_table(name + PART)  # it may be of another file, or of another number of shards


def found(client: LossClient, name: str) -> types.TableInfo | None:
    """Return the description of the table of that name; None if there is none."""
    return next((info for info in client.list_tables() if info.name == name), None)


def made(client: LossClient, name: str, spec: types.TableInfo) -> Table:
    """Create the table to fill."""
    return client.create_table(
        name,
        num_classes=spec.num_classes,
        dim=spec.dim,
        dtype=spec.dtype,
        bias=spec.bias,
        num_shards=spec.num_shards,
        placement=spec.placement,
        initializer=spec.initializer,
        optimizer=spec.optimizer,
        count_labels=spec.count_labels,
    )


def fill(table: Table, source: Source, progress: Progress) -> None:
    """Write every page to the table; the last one also sets its step."""
    num_rows = table.spec.num_classes
    for start, stop in spans(num_rows, COUNTS_PAGE) if source.tensors.keys() & {COUNTS, LEARNED} else ():
        written, learned = (
            source.tensors[name].read(start, stop) if name in source.tensors else None for name in (COUNTS, LEARNED)
        )
        table._write_counts_page(start, written, learned)
    for start, stop in spans(num_rows, table.page_rows):
        page = page_of(source, start, stop, table.spec)
        try:
            table.write_state(start, page, source.num_commits if stop == num_rows else None)
        except InvalidArgument as error:
            raise InvalidArgument(f"rows {start} to {stop}: {error.message}", **error.details) from None
        progress(stop, num_rows)


def page_of(source: Source, start: int, stop: int, spec: types.TableInfo) -> types.TableRows:
    """Read rows [start, stop) of a file, with their state."""
    pages = {name: stored.read(start, stop) for name, stored in source.tensors.items() if name not in (COUNTS, LEARNED)}
    rows, weights = pages[WEIGHTS], source.tensors[WEIGHTS].shape.dtype
    if weights == "bfloat16" and spec.dtype != "bfloat16":
        rows = widened(rows)
    biases = pages.get(BIASES)
    if biases is not None and source.tensors[BIASES].shape.dtype == "bfloat16":
        biases = widened(biases)
    of_rows = {name.removeprefix(OF_WEIGHTS): value for name, value in pages.items() if name.startswith(OF_WEIGHTS)}
    of_biases = {name.removeprefix(OF_BIASES): value for name, value in pages.items() if name.startswith(OF_BIASES)}
    return types.TableRows(rows, biases, of_rows, of_biases, 0, 0)


def widened(values: Array) -> Array:
    """Convert the bits of bfloat16 to float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def explained(table: Table, name: str) -> Iterator[None]:
    """Add to an error what happened to the table; delete a table that the server refused."""
    try:
        yield
    except (BadFile, InvalidArgument, LimitExceeded, NotSupported):
        with suppress(ShardlossError):
            table.client.delete_table(table.reference)
        raise
    except BaseException as error:
        left = (
            f"the import of {name!r} was interrupted: table {name + PART!r} is incomplete. Import again with resume "
            f"(--resume), or delete it (shardloss table delete {name + PART})"
        )
        if isinstance(error, ShardlossError):
            raise type(error)(f"{error.message}; {left}", **error.details) from error
        error.add_note(left)
        raise
