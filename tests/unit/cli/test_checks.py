"""Every mistake in the settings is one line that names the setting, found before anything is started."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shardloss_server.__main__ import app
from shardloss_server.cli.serve import announce, withdraw
from shardloss_server.config import CannotServe
from typer.testing import CliRunner

FREE = ("--port", "0", "--admin-port", "0")
LONG = "a" * 120


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of this machine on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file, a folder and a short path for a Unix socket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


def doctor(*options: str) -> list[str]:
    """Return the lines of `doctor` about checks that fail."""
    done = CliRunner().invoke(app, ["doctor", *options])
    failed = [line for line in done.output.splitlines() if not line.endswith(" ok")]
    assert done.exit_code == (1 if failed else 0), done.output
    return failed


def test_settings_without_a_mistake_pass_every_check(folder: Path) -> None:
    """`doctor` prints ok for each check and exits with 0."""
    assert doctor(*FREE, "--ready-file", "ready", "--socket", "s", "--metrics-port", "0") == []
    assert doctor(*FREE, "--local", "--host", "localhost") == []


MISTAKES = {
    "ready_file in no folder": (("--ready-file", "none/r"), "ready_file = none/r", "does not exist"),
    "ready_file in a file": (("--ready-file", "file/r"), "ready_file = file/r", "does not exist"),
    "ready_file is a folder": (("--ready-file", "folder"), "ready_file = folder", "is a folder"),
    "socket in no folder": (("--socket", "none/s"), "socket = none/s", "does not exist"),
    "socket is a file": (("--socket", "file"), "socket = file", "is not a socket"),
    "socket too long": (("--socket", LONG), "socket = aaa", "at most 107 bytes"),
    "no such host": (("--host", "no-such-host.invalid", "--allow-anonymous"), "host = no-such-host.invalid", "address"),
    "another's host": (("--host", "192.0.2.77", "--allow-anonymous"), "host = 192.0.2.77", "Cannot assign"),
    "another's metrics_host": (
        ("--metrics-port", "0", "--metrics-host", "192.0.2.77"),
        "metrics_host",
        "Cannot assign",
    ),
    "ray_address without a port": (("--ray-address", "head"), "ray_address = head", "host:port"),
    "ray_address of the client protocol": (
        ("--ray-address", "ray://h:10001"),
        "ray_address = ray://h:10001",
        "host:port",
    ),
    "ray_address and local": (("--ray-address", "auto", "--local"), "local", "ray_address = auto"),
    "tokens_file absent": (("--tokens-file", "none.toml"), "none.toml", "No such file"),
    "certificate absent": (("--tls-cert-file", "c.pem", "--tls-key-file", "k.pem"), "pem", "No such file"),
    "certificate without a key": (("--tls-cert-file", "c.pem"), "tls_cert_file = c.pem", "tls_key_file"),
    "open to the network": (("--host", "0.0.0.0"), "host = 0.0.0.0", "allow_anonymous"),
    "two equal ports": (("--port", "45001", "--admin-port", "45001"), "port and admin_port", "different ports"),
}


@pytest.mark.parametrize(("options", "setting", "reason"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_setting(
    folder: Path, options: tuple[str, ...], setting: str, reason: str
) -> None:
    """`doctor` reports it in one line, with what was found and what to do; `serve` makes the same checks."""
    (line,) = doctor(*FREE, *options)
    assert setting in line
    assert reason in line


@pytest.mark.parametrize("name", ["port", "admin-port", "metrics-port"])
def test_a_taken_port_is_named(taken_port: int, name: str) -> None:
    """The line names the setting and the port."""
    (line,) = doctor(*FREE, f"--{name}", str(taken_port))
    assert f"port {taken_port} ({name.replace('-', '_')})" in line


def test_a_socket_in_use_is_named(temp: Path) -> None:
    """A Unix socket on which a server listens is not taken from it."""
    path = str(temp / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        (line,) = doctor(*FREE, "--socket", path)
        assert f"socket = {path}: another server is using it" in line
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert doctor(*FREE, "--socket", path) == []  # nothing listens any more: it is replaced


def test_a_ray_address_of_nobody_is_refused(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, the line names ray_address; it is found before Ray is started."""
    monkeypatch.setattr("shardloss_server.cluster.surroundings.ABSENT_S", 0.3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        (line,) = doctor(*FREE, "--ray-address", address)
    assert f"ray_address = {address} does not answer" in line
    assert doctor(*FREE, "--ray-address", f"127.0.0.1:{taken_port}") == []


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("TMPDIR", "/none", "not a folder"),
        ("RAY_AUTH_MODE", "disabled", "every user of this machine could run code"),
        ("TMPDIR", LONG, "too long"),
    ],
)
def test_a_mistake_in_the_environment_is_refused_before_ray_starts(
    tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    """`serve` exits with 1 and one line that names the variable; it imports no Ray and starts no process."""
    if value == LONG:
        value = str(tmp_path / LONG)
        os.mkdir(value)
    program = (
        "import sys; from shardloss_server.__main__ import app\n"
        "try:\n    app(['serve', '--port', '0', '--admin-port', '0'])\n"
        "except SystemExit as end:\n    sys.exit(end.code if 'ray' not in sys.modules else 99)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{variable} = {value}" in line
    assert reason in line


def test_a_ready_file_that_cannot_be_written_or_removed_is_named(folder: Path) -> None:
    """Its folder may have gone since the checks: the server ends with one line."""
    with pytest.raises(CannotServe, match="ready_file = none/ready cannot be written: No such file"):
        announce(Path("none/ready"), "127.0.0.1:1")
    with pytest.raises(CannotServe, match="ready_file = file/ready cannot be removed: Not a directory"):
        withdraw(Path("file/ready"))


def test_every_address_of_a_host_is_checked(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is taken on the second address is found; an address that is not set up is no obstacle."""
    taken, absent = ("127.0.0.1", taken_port), ("192.0.2.77", 0)
    for second, expected in ((taken, 1), (absent, 0)):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (("127.0.0.2", 0), second)]
        monkeypatch.setattr("shardloss_server.cli.checks.socket.getaddrinfo", lambda *_, found=found, **__: found)
        assert len(doctor("--local", "--port", "0", "--admin-port", "0")) == expected
