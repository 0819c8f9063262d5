"""Settings: flag > environment > file > default, one definition each; anything else is refused."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
from shardloss_server.__main__ import app
from shardloss_server.cli.config import page
from shardloss_server.config import Limits, Listening
from shardloss_server.settings import ALL, SECTIONS, BadSettings, Settings, schema
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('max_batch = 3\nmax_dim = 4\nhost = "::1"\n')
    return path


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDLOSS_SERVER_MAX_BATCH", "5")
    monkeypatch.setenv("SHARDLOSS_SERVER_MAX_DIM", "6")
    settings = Settings.load({"max_batch": 7}, file)
    limits = settings.group(Limits)
    assert (limits.max_batch, limits.max_dim, settings.group(Listening).host) == (7, 6, "::1")
    assert limits.max_num_true == Limits().max_num_true
    assert [settings.sources[name] for name in ("max_batch", "max_dim", "host", "max_num_true")] == [
        "flag",
        "environment",
        "file",
        "default",
    ]


def test_the_environment_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLOSS_SERVER_CONFIG", str(file))
    assert Settings.load({}).values["max_batch"] == 3


def test_an_empty_variable_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty environment variable, as a compose file may set it, is treated as absent."""
    monkeypatch.setenv("SHARDLOSS_SERVER_TOKENS_FILE", "")
    assert Settings.load({}).values["tokens_file"] is None


@pytest.mark.parametrize(
    "text, flags, environment, words",
    [
        ("max_bath = 3", {}, {}, ["max_bath", "server.toml", "did you mean max_batch?"]),
        ("", {}, {"SHARDLOSS_SERVER_MAX_BATH": "3"}, ["SHARDLOSS_SERVER_MAX_BATH", "SHARDLOSS_SERVER_MAX_BATCH?"]),
        ("", {}, {"shardloss_server_max_batch": "3"}, ["not a setting", "did you mean SHARDLOSS_SERVER_MAX_BATCH?"]),
        ("drain_s = inf", {}, {}, ["drain_s in", "less than or equal to 1000000"]),
        ("", {"connection_idle_s": 1e10}, {}, ["--connection-idle-s", "less than or equal to 1000000"]),
        ("", {"max_message_bytes": 2**31}, {}, ["--max-message-bytes", "less than or equal to 1073741824"]),
        ("max_batch = 0", {}, {}, ["max_batch in", "= 0", "greater than or equal to 1"]),
        ("", {}, {"SHARDLOSS_SERVER_PORT": "tcp://10.0.0.1:7070"}, ["SHARDLOSS_SERVER_PORT = 'tcp://", "integer"]),
        ("", {"port": 65_536}, {}, ["--port = 65536", "less than or equal to 65535"]),
        ("max_batch = ", {}, {}, ["cannot read the settings file"]),
        ('log_format = "xml"', {}, {}, ["log_format in", "'text' or 'json'"]),
    ],
)
def test_what_is_wrong_is_said_with_where_it_came_from(
    text: str,
    flags: dict[str, object],
    environment: dict[str, str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as caught:
        Settings.load(flags, path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="cannot read the settings file"):
        Settings.load({}, tmp_path / "none.toml")


def test_no_name_stands_for_two_settings() -> None:
    """All sections share one namespace, so each setting's name is unique."""
    assert len(ALL) == sum(len(fields(group)) for group in SECTIONS.values())


def test_every_setting_has_a_meaning_and_a_flag_of_serve() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400"}).output
    for setting in ALL.values():
        assert len(setting.meaning) > 10
        assert f"{setting.flag} " in shown


def test_the_page_documents_the_code() -> None:
    """docs/configuration.md equals the output of `make docs`."""
    assert (ROOT / "docs/configuration.md").read_text() == "\n".join(page()) + "\n"


def test_the_schema_refuses_what_the_server_does() -> None:
    assert schema()["additionalProperties"] is False
    assert schema()["properties"]["max_batch"]["minimum"] == 1
    assert set(schema()["properties"]) == set(ALL)


def test_config_show_says_what_holds_and_where_it_came_from(file: Path) -> None:
    done = CliRunner().invoke(app, ["config", "show", "--config", str(file), "--port", "9", "--output", "json"])
    shown = json.loads(done.output)
    assert shown["max_batch"] == {"value": 3, "source": "file"}
    assert shown["port"] == {"value": 9, "source": "flag"}
    assert "max_batch" in CliRunner().invoke(app, ["config", "show", "--config", str(file)]).output


def test_config_show_says_what_is_wrong_as_json_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["config", "show", "--config", str(tmp_path / "none.toml"), "--output", "json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["reason"] == "BAD_SETTINGS"


def test_a_wrong_setting_ends_serve_with_two(tmp_path: Path) -> None:
    """A bad setting ends `serve` with exit code 2 before anything is started."""
    done = CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "none.toml")])
    assert done.exit_code == 2
    assert "cannot read" in done.output


@pytest.mark.parametrize("kind", ["folder", "absent", "binary", "pipe", "device"])
def test_a_settings_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, kind: str) -> None:
    """It is neither waited for nor read without end; the exit status is that of a wrong setting."""
    file = tmp_path / "s.toml"
    {
        "folder": file.mkdir,
        "absent": lambda: None,
        "binary": lambda: file.write_bytes(b"max_batch = 3 # \xff"),
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
    }[kind]()
    for command in (["config", "show"], ["serve", "--local"]):
        done = CliRunner().invoke(app, [*command, "--config", str(file)])
        assert (done.exit_code, done.output.count("\n")) == (2, 1), done.exception
        assert done.output.startswith(f"cannot read the settings file {file}: ")
