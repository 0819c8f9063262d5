"""The scripts of the containers repeat joins until a deadline, and a node is healthy once it is registered."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import ray._raylet

from tests.patience import eventually

SCRIPTS = Path(__file__).resolve().parents[3] / "deploy/docker"
RAY = """#!/bin/sh
echo start >> "$STARTS"
[ "$(wc -l < "$STARTS")" -gt "$FAILURES" ] || exit 3
[ "$2" = --block ] || exit 0
exec /bin/sleep 600
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script with a `ray` that fails some times, then holds (--block) or succeeds; pauses take no time."""
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("ray", "sleep"):
        (tmp_path / name).chmod(0o700)
    running = []

    def begin(*command: str, failures: int, join_s: int) -> subprocess.Popen[str]:
        changed = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTS": str(tmp_path / "starts")}
        changed |= {"FAILURES": str(failures), "SHARDLOSS_JOIN_S": str(join_s)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            ["sh", *command], cwd=SCRIPTS, env=os.environ | changed, stdout=pipe, stderr=pipe, text=True
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def starts(folder: Path) -> int:
    """Return how often `ray` was called."""
    return len((folder / "starts").read_text().split()) if (folder / "starts").exists() else 0


def test_a_node_that_fails_to_start_is_started_again(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Two failed starts do not end the container, and SIGTERM ends it with its node."""
    process = start("node.sh", "--address=head:6379", failures=2, join_s=600)
    eventually(lambda: starts(tmp_path) == 3, "the third start")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # the pipe closes when the node has ended too
    assert said.count("ended with status 3 and is repeated") == 2


def test_a_front_end_joins_again_before_its_command_runs(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The command runs once, after the join that succeeds."""
    process = start("joined.sh", "head:6379", "echo", "joined", failures=2, join_s=600)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out, starts(tmp_path)) == (0, "joined\n", 3)


@pytest.mark.parametrize(
    ("command", "status"),
    [(["node.sh", "--address=head:6379"], 3), (["joined.sh", "head:6379", "echo", "joined"], 1)],
)
def test_a_join_ends_at_its_deadline(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, command: list[str], status: int
) -> None:
    """After SHARDLOSS_JOIN_S the container ends with a failure, and its command does not run."""
    process = start(*command, failures=9, join_s=0)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out, starts(tmp_path)) == (status, "", 1)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The health check, with sockets in a folder of its own: `raylet` of an ended node, `raylet.1` of a living one."""
    spec = importlib.util.spec_from_file_location("registered", SCRIPTS / "registered.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as living:
        with socket.socket(socket.AF_UNIX) as ended:
            ended.bind(f"{folder}/raylet")
        living.bind(f"{folder}/raylet.1")
        living.listen()
        monkeypatch.setattr(module, "SOCKETS", f"{folder}/raylet*")
        monkeypatch.setattr(module, "FOUND", Path(folder) / "found")
        monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], ["10.0.0.2"]))
        yield module


def listed(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[str, int, str]) -> list[str]:
    """Let the GCS list nodes (address, state: 0 is alive, socket), and return the calls that it will get."""
    calls: list[str] = []
    fields = ("node_manager_address", "state", "raylet_socket_name")
    infos = {place: SimpleNamespace(**dict(zip(fields, node, strict=True))) for place, node in enumerate(nodes)}

    def client(address: str) -> SimpleNamespace:
        calls.append(address)
        return SimpleNamespace(get_all_node_info=lambda timeout: infos)

    monkeypatch.setattr(ray._raylet, "GcsClient", client)
    return calls


def test_a_node_of_a_repeated_join_is_healthy(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new raylet's socket has another name than that of the failed join; once found, the GCS is not asked again."""
    folder = Path(probe.SOCKETS).parent
    calls = listed(monkeypatch, ("10.0.0.2", 1, f"{folder}/raylet"), ("10.0.0.2", 0, f"{folder}/raylet.1"))
    assert probe.is_healthy("head:6379")
    assert probe.is_healthy("head:6379")
    assert calls == ["head:6379"]


@pytest.mark.parametrize(
    ("address", "state", "name"),
    [("10.0.0.2", 0, "raylet"), ("10.0.0.2", 1, "raylet.1"), ("10.0.0.3", 0, "raylet.1")],
    ids=["still-listed", "dead", "of-another-container"],
)
def test_a_node_that_is_not_registered_is_not_healthy(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch, address: str, state: int, name: str
) -> None:
    """A raylet lives here, but the GCS lists an ended node, calls it dead, or lists only another container's."""
    listed(monkeypatch, (address, state, f"{Path(probe.SOCKETS).parent}/{name}"))
    assert not probe.is_healthy("head:6379")
    assert not probe.FOUND.exists()


def test_a_node_whose_raylet_ended_is_not_healthy(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before does not count once its socket refuses connections."""
    probe.FOUND.write_text(f"{Path(probe.SOCKETS).parent}/raylet")
    listed(monkeypatch)
    assert not probe.is_healthy("head:6379")
