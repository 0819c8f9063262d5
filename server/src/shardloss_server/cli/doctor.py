"""The command `doctor`: every check that `serve` makes before it starts anything."""

from __future__ import annotations

import json

import typer

from shardloss_server.cli.checks import CHECKS
from shardloss_server.cli.flags import with_flags
from shardloss_server.cli.output import Output, OutputOption
from shardloss_server.config import CannotServe
from shardloss_server.settings import Settings


@with_flags
def doctor(settings: Settings, output: OutputOption = Output.TEXT) -> None:
    """Check the settings against this machine without starting anything; accepts the flags of serve.

    The exit status is 1 if `serve` would refuse to start.
    """
    failures: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(settings)
            failures[name] = None
        except CannotServe as error:
            failures[name] = str(error)
    if output is Output.JSON:
        typer.echo(json.dumps(failures, indent=1))
    else:
        for name, failure in failures.items():
            typer.echo(f"{name:<9} {'ok' if failure is None else failure}")
    if any(failures.values()):
        raise typer.Exit(1)
