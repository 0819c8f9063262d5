"""`shardloss table ...`: make, look at, delete, and files."""

from __future__ import annotations

import sys
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
from shardloss.files.facts import of_kind

app = typer.Typer(help="Tables: make, look at, delete, export to files and import.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the table.")]


def document(info: types.TableInfo) -> dict[str, Any]:
    """A table as JSON has it."""
    return asdict(info) | {"optimizer": of_kind(info.optimizer), "initializer": of_kind(info.initializer)}


def lines(info: types.TableInfo) -> Any:
    """A table as people read it."""
    shown = {name: value for name, value in document(info).items() if not isinstance(value, dict)}
    for name, one in (("optimizer", of_kind(info.optimizer)), ("initializer", of_kind(info.initializer))):
        numbers = ", ".join(f"{key}={value}" for key, value in one.items() if key != "kind")
        shown[name] = f"{one['kind']} ({numbers})" if numbers else one["kind"]
    return grid(("", ""), [(name, str(value)) for name, value in shown.items()])


@app.command()
@command
def create(
    call: Invocation,
    name: Name,
    classes: Annotated[int, typer.Option(min=1, help="V, rows.")],
    dim: Annotated[int, typer.Option(min=1, help="D, numbers of a row.")],
    dtype: DTypeOption = "float32",
    bias: Annotated[bool, typer.Option(help="Whether rows have a bias.")] = True,
    shards: Shards = 0,
    placement: Annotated[str, typer.Option(help="mod: dealt out in turn; div: contiguous ranges.")] = "mod",
    optimizer_kind: OptimizerOption = None,
    initializer_kind: InitializerOption = None,
    count_labels: CountLabels = False,
) -> None:
    """Make a table, or find the one that is there with an equal spec."""
    start, steps = initializer(initializer_kind), optimizer(optimizer_kind)
    with call.connection.connect() as client:
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
        ).spec
    call.emit(document(info), lambda: lines(info))


@app.command("list")
@command
def list_tables(call: Invocation) -> None:
    """List all tables."""
    with call.connection.connect() as client:
        tables = client.list_tables()
    columns = ("name", "classes", "dim", "dtype", "shards", "version", "commits", "tickets")
    rows = [
        (t.name, t.num_classes, t.dim, t.dtype, t.num_shards, t.version, t.num_commits, t.num_open_tickets)
        for t in tables
    ]
    text = "no tables; make one with: shardloss table create NAME --classes V --dim D"
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
        str | None, typer.Option("--format", help="safetensors or numpy; default: by the name of the file.")
    ] = None,
    allow_moving: Annotated[
        bool, typer.Option("--allow-moving", help="Take rows of several versions where others train meanwhile.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a table with its optimizer state to a file, a page at a time."""
    with call.connection.connect() as client, progress(f"export {name}") as bar:
        done = files.export_table(
            client.table(name), path, format=file_format, allow_moving=allow_moving, overwrite=overwrite, progress=bar
        )
    moved = f", moving on to {done.last_version} meanwhile" if done.last_version != done.version else ""
    text = f"{done.num_rows} rows of version {done.version}{moved}, {Size(done.num_bytes)}, in {done.path}"
    call.emit(done, lambda: text)


@app.command("import")
@command
def import_(
    call: Invocation,
    path: Annotated[Path, typer.Argument(help="What export wrote, or any safetensors or .npy file of rows.")],
    name: Name,
    shards: Shards = 0,
    placement: Annotated[str | None, typer.Option(help="mod or div; default: the file's.")] = None,
    weights_name: Annotated[
        str | None, typer.Option(help="Tensor [V, D] of rows alone, as a checkpoint's lm_head.weight.")
    ] = None,
    biases_name: Annotated[str | None, typer.Option(help="With it, tensor [V] of the biases.")] = None,
    dtype: DTypeOption = None,
    bias: Annotated[bool | None, typer.Option(help="Of rows alone: whether they have a bias.")] = None,
    optimizer_kind: OptimizerOption = None,
    count_labels: CountLabels = False,
    resume: Annotated[bool, typer.Option("--resume", help="Fill a table anew whose import broke off.")] = False,
) -> None:
    """Make a table of a file, a page at a time; it has its name once it is whole."""
    steps = optimizer(optimizer_kind)
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
            progress=bar,
        ).info()
    call.emit(document(info), lambda: lines(info))


@app.command()
@command
def delete(
    call: Invocation,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a table with all its rows and state."""
    with call.connection.connect() as client:
        info = client.table(name).spec
        if not yes and not sys.stdin.isatty():
            raise typer.BadParameter("nobody can be asked here: say it with --yes", param_hint="delete")
        question = f"Delete {name} with {info.num_classes} rows and {info.num_commits} commits?"
        if not yes and not typer.confirm(question, err=True):
            fail(call.output, "INTERRUPTED", f"{name} is not deleted: the answer was no")
            raise typer.Exit(1)
        client.delete_table(name)
    call.emit({"deleted": name}, lambda: f"{name} is deleted")
