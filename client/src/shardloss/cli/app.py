"""The application `shardloss`: all of its commands, and their exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer

from shardloss import __version__
from shardloss.cli import doctor, evaluate, status, table
from shardloss.cli.output import Output, OutputOption, emit, fail

app = typer.Typer(
    name="shardloss",
    help="Client of a shardloss server: class tables and their files, exact evaluation, status and diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(table.app, name="table")
app.command("evaluate")(evaluate.evaluate)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)

# typer does not export the base class of its usage errors
MISUSED: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.command()
def version(output: OutputOption = Output.TEXT) -> None:
    """Print the version."""
    emit(output, {"version": __version__}, lambda: __version__)


def run(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 refused or failed, 2 usage error, 130 interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        code = typer.main.get_command(app).main(args, prog_name="shardloss", standalone_mode=False)
    except MISUSED as error:
        if wants_json(args):
            fail(Output.JSON, "USAGE", error.format_message())
        else:
            error.show()
        return 2
    except typer.Abort:
        fail(Output.JSON if wants_json(args) else Output.TEXT, "INTERRUPTED", "interrupted")
        return 130
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def wants_json(args: Sequence[str]) -> bool:
    """Return True if a command line that could not be parsed requests JSON output."""
    given = [after for before, after in pairwise(args) if before == "--output"]
    given += [arg.removeprefix("--output=") for arg in args if arg.startswith("--output=")]
    return (given or [os.environ.get("SHARDLOSS_OUTPUT", "")])[-1] == Output.JSON
