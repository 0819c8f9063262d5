"""A file to a table, a page at a time; the table gets its name once it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
    TableNotFound,
)
from shardloss.files.exporting import COUNTS_PAGE, Progress, refuse_old, spans, unseen
from shardloss.files.facts import BIASES, COUNTS, LEARNED, OF_BIASES, OF_WEIGHTS, WEIGHTS
from shardloss.files.opening import Opened, open_file
from shardloss.files.stored import Stored
from shardloss.table import Table
from shardloss.wire import Array

PART = ".part"  # a table under this name is not whole yet
FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Source:
    """What a table is to be made of: its tensors by their names in a file, its spec, its step (None: 0)."""

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
    progress: Progress | None = None,
) -> Table:
    """Make a table of a file, holding no more than a page of it.

    What `export_table` wrote goes on training as it would have where it came from, on any num_shards (0: one a worker)
    and placement (None: the file's). Any other safetensors file gives rows from the tensor weights_name [V, D] (and
    biases from biases_name [V]), a .npy file rows from its one array; then dtype (None: the file's, or float32 for
    float16), bias (None: whether biases_name is given), optimizer and count_labels are the new table's.

    The table is called name + ".part" until all is written. Where that breaks off, it stays under that name, with
    resume=True it is filled anew; what the server refuses is deleted again.

    Raises:
        BadFile: the file is cut off, of another shape or dtype, or does not hold what it says; no table is made.
        TableExists: the name is taken, or an import of it broke off before (give resume, or delete NAME.part).
        InvalidArgument, LimitExceeded: the server refuses the table or a row; none is left.
        TransientError, ServiceError: it broke off; the message says what to do.
    """
    refuse_old(client)
    opened = open_file(path)
    asked = (weights_name, biases_name, dtype, bias, optimizer, count_labels or None)
    if opened.facts is not None and weights_name is None:
        if any(option is not None for option in asked):
            raise InvalidArgument(
                f"{path} says what its table is: options of rows alone need weights_name (--weights-name weights)"
            )
        source = Source(dict(opened.tensors), opened.facts.spec, opened.facts.num_commits)
    else:
        plain = rows_alone(opened, weights_name, biases_name, dtype, bias)
        source = replace(plain, spec=replace(plain.spec, optimizer=optimizer or types.Sgd(), count_labels=count_labels))
    spec = replace(source.spec, num_shards=num_shards, placement=placement or source.spec.placement)
    refuse_taken(client, name, resume)
    table = made(client, name + PART, spec)
    with explained(client, name):
        fill(table, source, progress or unseen)
        return client.rename_table(table.name, name)


def rows_alone(
    opened: Opened, weights_name: str | None, biases_name: str | None, dtype: str | None, bias: bool | None
) -> Source:
    """The rows, and biases, of a file that is no table's."""
    weights = opened.tensor(weights_name or WEIGHTS, "rows (--weights-name)", 2)
    tensors = {WEIGHTS: weights}
    num_classes, dim = weights.shape.sizes
    if biases_name is not None:
        tensors[BIASES] = opened.tensor(biases_name, "biases (--biases-name)", 1)
        if tensors[BIASES].num_rows != num_classes:
            raise BadFile(f"{opened.path}: {biases_name} is {tensors[BIASES].shape} for {num_classes} rows")
    for stored in tensors.values():
        if stored.shape.dtype not in FLOATS:
            raise BadFile(f"{opened.path}: {stored.name} is {stored.shape}; one of {', '.join(FLOATS)} is needed")
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


def refuse_taken(client: LossClient, name: str, resume: bool) -> None:
    """Refuse a name that a whole table has, or half a one that is not to be filled anew; else that half goes.

    Raises:
        TableExists: it is taken.
    """
    if exists(client, name):
        raise TableExists(f"a table is named {name!r}: delete it, or import under another name", field="name")
    if not exists(client, name + PART):
        return
    if not resume:
        raise TableExists(
            f"an import of {name!r} is under way or broke off: fill it anew with resume (--resume), or delete table "
            f"{name + PART!r}",
            field="name",
        )
    client.delete_table(name + PART)  # what it holds may be of another file, and of another cut


def exists(client: LossClient, name: str) -> bool:
    """Whether there is such a table."""
    try:
        client.table(name)
    except TableNotFound:
        return False
    return True


def made(client: LossClient, name: str, spec: types.TableInfo) -> Table:
    """The table to fill."""
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
    """Write every page; the step goes with the last one."""
    num_rows = table.spec.num_classes
    for start, stop in spans(num_rows, COUNTS_PAGE) if source.tensors.keys() & {COUNTS, LEARNED} else ():
        written, learned = (
            source.tensors[name].read(start, stop) if name in source.tensors else None for name in (COUNTS, LEARNED)
        )
        table.write_counts_page(start, written, learned)
    for start, stop in spans(num_rows, table.page_rows):
        page = page_of(source, start, stop, table.spec)
        try:
            table.write_state(start, page, source.num_commits if stop == num_rows else None)
        except InvalidArgument as error:
            raise InvalidArgument(f"rows {start} to {stop}: {error.message}", **error.details) from None
        progress(stop, num_rows)


def page_of(source: Source, start: int, stop: int, spec: types.TableInfo) -> types.TableRows:
    """Rows [start, stop) of a file."""
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
    """The bits of bfloat16 as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def explained(client: LossClient, name: str) -> Iterator[None]:
    """What breaks an import off says what has become of the table; one that was refused is deleted."""
    try:
        yield
    except (BadFile, InvalidArgument, LimitExceeded, NotSupported):
        with suppress(ShardlossError):
            client.delete_table(name + PART)
        raise
    except BaseException as error:
        left = (
            f"the import of {name!r} broke off: table {name + PART!r} is not whole. Import again with resume "
            f"(--resume), or delete it (shardloss table delete {name + PART})"
        )
        if isinstance(error, ShardlossError):
            raise type(error)(f"{error.message}; {left}", **error.details) from error
        error.add_note(left)
        raise
