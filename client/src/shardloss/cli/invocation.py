"""The options that all commands share (connection and output), and the exit codes of their errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import typer
from rich.console import RenderableType

from shardloss.cli.connection import Connection
from shardloss.cli.output import Output, OutputOption, emit, fail
from shardloss.errors import ShardlossError


@dataclass(frozen=True, slots=True)
class Invocation:
    """The shared options of one call of a command: its connection and its output format."""

    connection: Connection
    output: Output

    def emit(self, document: Any, text: Callable[[], RenderableType]) -> None:
        """Print the result."""
        emit(self.output, document, text)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the shared options added; the function gets them as its first argument, an `Invocation`.

    A `ShardlossError` ends the command with exit code 1.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    shared = [field.name for field in fields(Connection)]

    def run(output: Output, **given: Any) -> None:
        connection = Connection(**{name: given.pop(name) for name in shared})
        with failing(output):
            function(Invocation(connection, output), **given)

    hints = get_type_hints(Connection, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = Connection()
    parameters = [each.replace(kind=keyword) for each in own]
    parameters += [inspect.Parameter("output", keyword, default=Output.TEXT, annotation=OutputOption)]
    parameters += [
        inspect.Parameter(name, keyword, default=getattr(defaults, name), annotation=hints[name]) for name in shared
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


@contextmanager
def failing(output: Output) -> Iterator[None]:
    """Print a `ShardlossError` and exit with 1; on Ctrl-C print what was left behind and exit with 130."""
    try:
        yield
    except ShardlossError as error:
        fail(output, error.reason, error.message, **error.details)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
        fail(output, "INTERRUPTED", "; ".join(["interrupted", *notes]))
        raise typer.Exit(130) from None
