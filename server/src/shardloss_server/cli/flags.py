"""A flag for every setting, for commands that accept all settings without listing them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from shardloss_server.cli.output import Output, fail
from shardloss_server.settings import ALL, BadSettings, Setting, Settings

CONFIG_HELP = (
    "TOML file of settings. Flags override the environment, which overrides the file, which overrides the defaults."
)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add --config and one option per setting to a command's own options.

    The command receives the settings as its first argument. If a setting is invalid, the command prints why and exits
    with status 2.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(config: Path | None, **given: Any) -> None:
        others = {each.name: given.pop(each.name) for each in own}
        try:
            settings = Settings.load({name: value for name, value in given.items() if value is not None}, config)
        except BadSettings as error:
            fail(others.get("output", Output.TEXT), "BAD_SETTINGS", str(error))
            raise typer.Exit(2) from None
        command(settings, **others)

    file = Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP)]
    hints = {"config": file} | {name: option(setting) for name, setting in ALL.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in hints.items()]
    parameters += [each.replace(kind=keyword) for each in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads this
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def option(setting: Setting) -> Any:
    """Return a setting as a typer annotation; its value is None unless given, so that other sources apply."""
    kind = setting.annotation.__origin__
    flag = f"{setting.flag}/--no-{setting.flag[2:]}" if kind is bool else setting.flag
    shown = default_text(setting)
    return Annotated[
        kind | None,
        typer.Option(flag, help=escape(setting.meaning), rich_help_panel=setting.section, show_default=shown),
    ]


def default_text(setting: Setting) -> str:
    """Return a setting's default as the help and the documentation show it."""
    default = setting.field.default
    if default is MISSING:
        return "computed"
    if default is None or default == "":
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)
