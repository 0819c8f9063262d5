"""How commands print: for people, or as one JSON document."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Output(StrEnum):
    """For whom."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", help="For people, or one JSON document.")]


def fail(output: Output, reason: str, message: str) -> None:
    """Print why a command failed: as JSON on stdout, as text on stderr."""
    if output is Output.JSON:
        typer.echo(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        typer.echo(message, err=True)
