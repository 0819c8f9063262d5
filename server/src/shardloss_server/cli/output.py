"""The output of commands: text for people, or one JSON document."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console, RenderableType


class Output(StrEnum):
    """The format of a command's output."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", help="Text for people, or one JSON document.")]


def show(text: RenderableType) -> None:
    """Print text or a table on stdout as it is: paths may contain [brackets] and :colons:."""
    Console(markup=False, emoji=False).print(text)


def fail(output: Output, reason: str, message: str) -> None:
    """Print the reason for a command's failure, as JSON on stdout or as text on stderr."""
    if output is Output.JSON:
        typer.echo(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        typer.echo(message, err=True)
