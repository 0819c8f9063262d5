"""The output of commands: text or one JSON document on stdout, and progress on stderr if that is a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

PIPED_COLUMNS = 240  # width of text in a file or a pipe, enough that lines are not wrapped


class Output(StrEnum):
    """The format of a command's output."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option(envvar="SHARDLOSS_OUTPUT", help="Print text, or one JSON document.")]


def screen() -> Console:
    """Return a console on standard output that prints text as it is: paths may contain [brackets] and :colons:."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(width=PIPED_COLUMNS, highlight=False, markup=False, emoji=False)


def plain(value: Any) -> Any:
    """Convert a value for JSON: dataclasses become objects; nan and infinities become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(output: Output, document: Any, text: Callable[[], RenderableType]) -> None:
    """Print a command's result."""
    if output is Output.JSON:
        typer.echo(json.dumps(plain(document)))
    else:
        screen().print(text())


def fail(output: Output, reason: str, message: str, **details: Any) -> None:
    """Print the reason why a command failed: as JSON on stdout, as text on stderr."""
    if output is Output.JSON:
        typer.echo(json.dumps({"error": {"reason": reason, "message": message, **plain(details)}}))
    else:
        typer.echo(f"{reason}: {message}", err=True)


def grid(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Grid:
    """Return a table of text; numbers are aligned to the right."""
    made = Grid(box=None, show_header=any(columns), pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        is_number = bool(rows) and not isinstance(rows[0][place], str)
        made.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        made.add_row(
            *(f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell) for cell in row)
        )
    return made


class Size(float):
    """A number of bytes that is printed in binary units."""

    def __str__(self) -> str:
        """Return the size in the largest unit that fits, such as 1.5 GiB."""
        value, units = float(self), ["B", "KiB", "MiB", "GiB", "TiB"]
        while value >= 1024 and len(units) > 1:
            value, units = value / 1024, units[1:]
        return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar on stderr if that is a terminal; yield its update function (done, total)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
