"""`config show`, `config schema` and `config page`: the settings as they are, and as they are documented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table

from shardloss_server.cli.flags import default_text, with_flags
from shardloss_server.cli.output import Output, OutputOption
from shardloss_server.settings import ALL, ENV_PREFIX, FILE_VARIABLE, SECTIONS, Setting, Settings, schema

INTRODUCTION = f"""\
# Configuration

Every setting of `shardloss-server serve` has a flag, an environment variable and a key of a TOML file. A flag goes
before the environment, that before the file, that before the default. The flag is the name with dashes (`--max-batch`),
the variable `{ENV_PREFIX}` and the name in capitals (`{ENV_PREFIX}MAX_BATCH`), where an empty one counts as
absent. The file comes by `--config FILE`, or by its path in `{FILE_VARIABLE}`. Unknown names are errors.
`shardloss-server config show` says what holds and where it came from, `config schema` prints a JSON schema of the
file. This page is made by `make docs`."""
app = typer.Typer(no_args_is_help=True, help="The settings: flag > environment > file > default.")


@app.command("show")
@with_flags
def show(settings: Settings, output: OutputOption = Output.TEXT) -> None:
    """Show every setting's value and where it came from; takes the flags of serve."""
    if output is Output.JSON:
        typer.echo(
            json.dumps(
                {
                    name: {"value": to_jsonable_python(settings.values[name]), "source": settings.sources[name]}
                    for name in ALL
                },
                indent=1,
            )
        )
        return
    table = Table("setting", "value", "from", "meaning")
    for name, setting in ALL.items():
        value = settings.values[name]
        table.add_row(name, "" if value is None else str(value), settings.sources[name], setting.meaning)
    Console().print(table)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a settings file."""
    typer.echo(json.dumps(schema(), indent=1))


@app.command("page")
def print_page() -> None:
    """Print the page that documents every setting (docs/configuration.md)."""
    typer.echo("\n".join(page()))


def page() -> Iterator[str]:
    """The lines of docs/configuration.md."""
    yield from INTRODUCTION.splitlines()
    for section, group in SECTIONS.items():
        yield from (
            "",
            f"## {section}",
            "",
            str(group.__doc__),
            "",
            "| setting | type | default | meaning |",
            "|---|---|---|---|",
        )
        for setting in (each for each in ALL.values() if each.section == section):
            yield f"| `{setting.name}` | {type_text(setting)} | {default_text(setting)} | {setting.meaning} |"


def type_text(setting: Setting) -> str:
    """A setting's type and bounds, in words."""
    kind = setting.annotation.__origin__
    bounds: list[Any] = setting.annotation.__metadata__[0].metadata
    marks = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{marks[name]} {getattr(each, name)}" for each in bounds for name in marks if hasattr(each, name)]
    return " ".join([name_of(kind), ", ".join(limits)]).strip()


def name_of(kind: Any) -> str:
    """A type in words; that a setting may be absent, its default says."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(kind))
    if get_args(kind):
        return " or ".join(name_of(each) for each in get_args(kind) if each is not type(None))
    return {"str": "text", "int": "integer", "float": "number", "bool": "yes or no", "Path": "path"}[kind.__name__]
