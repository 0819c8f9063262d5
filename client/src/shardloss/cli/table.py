"""`shardloss table ...`: create, list, show, export, import and delete tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from shardloss import files, types
from shardloss.cli.invocation import Invocation, command
from shardloss.cli.output import Size, fail, grid, progress
from shardloss.cli.values import (
    CountLabels,
    DTypeOption,
    InitializerOption,
    OptimizerOption,
    Shards,
    initializer,
    optimizer,
)
from shardloss.client import FILL_S
from shardloss.files.facts import of_kind

app = typer.Typer(help="Create, list, show, export, import and delete tables.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the table.")]


def document(info: types.TableInfo) -> dict[str, Any]:
    """Return the JSON document of a table."""
    return asdict(info) | {"optimizer": of_kind(info.optimizer), "initializer": of_kind(info.initializer)}


def marked(info: types.TableInfo) -> str:
    """Return the mark of a table that is not ready."""
    return {"ready": "", "creating": f"creating {info.filled:.0%}"}.get(info.state, "ROWS LOST")


def lines(info: types.TableInfo) -> Any:
    """Format a table as text."""
    shown = {name: value for name, value in document(info).items() if not isinstance(value, dict) and name != "filled"}
    shown["state"] = marked(info) or info.state
    for name, one in (("optimizer", of_kind(info.optimizer)), ("initializer", of_kind(info.initializer))):
        numbers = ", ".join(f"{key}={value}" for key, value in one.items() if key != "kind")
        shown[name] = f"{one['kind']} ({numbers})" if numbers else one["kind"]
    return grid(("", ""), [(name, str(value)) for name, value in shown.items()])


@app.command()
@command
def create(
    call: Invocation,
    name: Name,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes V.")],
    dim: Annotated[int, typer.Option(min=1, help="Dimension D of a row.")],
    dtype: DTypeOption = "float32",
    bias: Annotated[bool, typer.Option(help="Give every row a bias.")] = True,
    shards: Shards = 0,
    placement: Annotated[str, typer.Option(help="mod: class id modulo K; div: contiguous ranges.")] = "mod",
    optimizer_kind: OptimizerOption = None,
    initializer_kind: InitializerOption = None,
    count_labels: CountLabels = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that filling all rows may take.")] = FILL_S,
) -> None:
    """Create a table, or find an existing one with an equal spec; other tables can be used while its rows are filled.

    If this command is interrupted, the server deletes what it had of the table.
    """
    start, steps = initializer(initializer_kind), optimizer(optimizer_kind)
    with call.connection.connect() as client, progress(f"create {name}") as bar, given_up(name):
        info = client.create_table(
            name,
            num_classes=classes,
            dim=dim,
            dtype=dtype or "float32",
            bias=bias,
            num_shards=shards,
            placement=placement,
            initializer=start,
            optimizer=steps,
            count_labels=count_labels,
            timeout_s=timeout,
            progress=bar,
        ).spec
    call.emit(document(info), lambda: lines(info))


@contextmanager
def given_up(name: str) -> Iterator[None]:
    """Add to an interruption what becomes of the table that was being created."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"the creation of {name!r} was given up, and the server deletes what it had of the table")
        raise


@app.command("list")
@command
def list_tables(call: Invocation) -> None:
    """List all tables."""
    with call.connection.connect() as client:
        tables = client.list_tables()
    columns = ("name", "", "classes", "dim", "dtype", "shards", "version", "commits", "tickets")
    rows = [
        (t.name, marked(t), t.num_classes, t.dim, t.dtype, t.num_shards, t.version, t.num_commits, t.num_open_tickets)
        for t in tables
    ]
    text = "no tables; create one with: shardloss table create NAME --classes V --dim D"
    call.emit({"tables": [document(t) for t in tables]}, lambda: grid(columns, rows) if rows else text)


@app.command()
@command
def show(call: Invocation, name: Name) -> None:
    """Show one table."""
    with call.connection.connect() as client:
        info = client.table(name).spec
    call.emit(document(info), lambda: lines(info))


@app.command()
@command
def export(
    call: Invocation,
    name: Name,
    path: Annotated[Path, typer.Argument(help="FILE.safetensors, or a folder for NumPy files.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help="safetensors or numpy. Default: by the name of the file.")
    ] = None,
    allow_moving: Annotated[
        bool, typer.Option("--allow-moving", help="Accept rows of several versions if others train the table.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or folder.")] = False,
) -> None:
    """Write a table with its optimizer state to a file, a page at a time."""
    with call.connection.connect() as client, progress(f"export {name}") as bar:
        done = files.export_table(
            client.table(name), path, format=file_format, allow_moving=allow_moving, overwrite=overwrite, progress=bar
        )
    moved = f" to {done.last_version}" if done.last_version != done.version else ""
    text = f"{done.num_rows} rows of version {done.version}{moved}, {Size(done.num_bytes)}, in {done.path}"
    call.emit(done, lambda: text)


@app.command("import")
@command
def import_(
    call: Invocation,
    path: Annotated[
        Path,
        typer.Argument(help="An exported table, a checkpoint in safetensors (file, index or folder), or a .npy file."),
    ],
    name: Name,
    shards: Shards = 0,
    placement: Annotated[str | None, typer.Option(help="mod or div. Default: the file's.")] = None,
    weights_name: Annotated[
        str | None, typer.Option(help="Import only this tensor [V, D] of rows, such as a checkpoint's lm_head.weight.")
    ] = None,
    biases_name: Annotated[str | None, typer.Option(help="Tensor [V] of the biases, with --weights-name.")] = None,
    dtype: DTypeOption = None,
    bias: Annotated[bool | None, typer.Option(help="Give every row a bias. Default: only with --biases-name.")] = None,
    optimizer_kind: OptimizerOption = None,
    count_labels: CountLabels = False,
    resume: Annotated[bool, typer.Option("--resume", help="Replace the remains of an interrupted import.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an existing table, once the new one is complete.")
    ] = False,
) -> None:
    """Create a table from a file, a page at a time; the table gets its name once it is complete."""
    steps = optimizer(optimizer_kind)
    files.open_file(path)  # a bad file is named even if no server is there
    with call.connection.connect() as client, progress(f"import {name}") as bar:
        info = files.import_table(
            client,
            path,
            name,
            num_shards=shards,
            placement=placement,
            weights_name=weights_name,
            biases_name=biases_name,
            dtype=dtype,
            bias=bias,
            optimizer=steps,
            count_labels=count_labels,
            resume=resume,
            replace=replace,
            progress=bar,
        ).info()
    call.emit(document(info), lambda: lines(info))


@app.command()
@command
def delete(
    call: Invocation,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a table with all its rows and state."""
    with call.connection.connect() as client:
        info = client.table(name).spec
        if not yes and not sys.stdin.isatty():
            raise typer.BadParameter("there is no terminal to ask for confirmation; pass --yes", param_hint="delete")
        question = f"Delete {name} with {info.num_classes} rows and {info.num_commits} commits?"
        if not yes and not typer.confirm(question, err=True):
            fail(call.output, "INTERRUPTED", f"{name} was not deleted: the answer was no")
            raise typer.Exit(1)
        client.delete_table(info.reference)  # no other table that has got the name since
    call.emit({"deleted": name}, lambda: f"{name} was deleted")
