"""Text in [brackets] is printed as it is, in the help and in the output of both command lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from shardloss.cli import app as client
from shardloss.cli.output import Output, emit, grid
from shardloss_server import __main__ as server
from shardloss_server.settings import ALL
from typer.testing import CliRunner

ODD = "/data/[old]/[/x]/[red]a:bus:b"
APPS = {"shardloss": client.app, "shardloss-server": server.app}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command below an application, with its path."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


@pytest.mark.parametrize("name", APPS)
def test_no_word_of_a_help_text_is_swallowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an option says of itself is in --help; a backslash only escapes a bracket."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("TERMINAL_WIDTH", "1000")
    said = {setting.flag: setting.meaning for setting in ALL.values()}
    num_settings = 0
    for path, command in commands(typer.main.get_command(APPS[name])):
        shown = " ".join(CliRunner().invoke(APPS[name], [*path, "--help"]).output.split())
        assert all(line.strip() in shown for line in (command.help or "").splitlines()), path
        for option in command.params:
            flag = option.opts[0]
            is_setting = path in (("serve",), ("doctor",), ("config", "show")) and flag in said
            num_settings += is_setting
            meaning = said[flag] if is_setting else getattr(option, "help", None) or ""
            assert " ".join(meaning.split()) in shown, (path, flag)
            assert "\\[" not in shown
    assert num_settings == (3 * len(ALL) if name == "shardloss-server" else 0)


@pytest.mark.parametrize("text", [ODD, "labels[17, 0] = 3", "[bold]x[/bold]"])
def test_a_result_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A path with brackets is neither a style nor an error, and a path with colons is no pictogram."""
    emit(Output.TEXT, {}, lambda: f"wrote {text}")
    emit(Output.TEXT, {}, lambda: grid(("path", ""), [(text, 1)]))
    assert capsys.readouterr().out.count(text) == 2


def test_a_setting_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = CliRunner().invoke(server.app, ["config", "show", "--socket", ODD, "--metrics-host", "[::1]"]).output
    assert ODD in shown
    assert "[::1]" in shown
    assert "needs shardloss-server[tracing]." in shown


def test_a_usage_error_names_its_argument_as_it_is() -> None:
    done = CliRunner().invoke(server.app, ["serve", "--no[red]thing[/]"])
    assert done.exit_code == 2
    assert "--no[red]thing[/]" in done.output
