"""`shardloss-server serve`, run as an operator would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import shardloss
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

START_S = 300.0  # far more than a busy machine needs
STOP_S = 120.0


@contextmanager
def serving(tmp_path: Path, *options: str, temp: Path | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server process and yield it with its address; it is terminated in any case."""
    ready = tmp_path / "ready"
    command = [
        sys.executable,
        "-m",
        "shardloss_server",
        "serve",
        "--port",
        "0",
        "--admin-port",
        "0",
        "--ready-file",
        str(ready),
        *options,
    ]
    environment = os.environ if temp is None else {**os.environ, "TMPDIR": str(temp)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            deadline = time.monotonic() + START_S
            while not ready.exists():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "the server did not start in time"
                time.sleep(0.05)
            yield process, ready.read_text()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(STOP_S)


def children_of(pid: int) -> set[int]:
    """Return the pids of all running descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def wait_gone(pids: set[int], timeout_s: float) -> set[int]:
    """Wait until all pids have ended, at most timeout_s; return those that still run."""
    deadline = time.monotonic() + timeout_s
    while True:
        alive = {pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)}
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


def is_zombie(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_local_server_serves_and_stops_cleanly(tmp_path: Path, number: int) -> None:
    """The server writes its address when it is ready, answers calls, and exits with 0 on a signal."""
    with serving(tmp_path, "--local", "--workers", "1") as (process, address):
        with shardloss.connect(address) as client:
            table = client.create_table("t", num_classes=11, dim=3)
            hidden = np.ones((2, 3), np.float32)
            result = table.session().train_step(hidden, np.array([1, 2]), shardloss.FullSoftmax(), learning_rate=0.1)
            assert result.committed is not None
            assert result.committed.version == 1
        process.send_signal(number)
        assert process.wait(STOP_S) == 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_server_stops_every_process_it_started(tmp_path: Path, temp: Path) -> None:
    """After SIGTERM no worker, no process of Ray and no temporary file is left."""
    with serving(tmp_path, "--workers", "2", temp=temp) as (process, address):
        with shardloss.connect(address) as client:
            assert client.info.num_workers == 2
            client.create_table("t", num_classes=11, dim=3)
        children = children_of(process.pid)
        assert len(children) > 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    assert wait_gone(children, STOP_S) == set()
    assert list(temp.glob("shardloss-*")) == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_told_to_stop_while_it_starts_leaves_nothing(temp: Path) -> None:
    """On SIGTERM during Ray's start the server exits with 0, and no process or file of Ray is left."""
    command = [sys.executable, "-m", "shardloss_server", "serve", "--port", "0", "--admin-port", "0"]
    environment = {**os.environ, "TMPDIR": str(temp)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + START_S
        while not (children := children_of(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline, "Ray did not start in time"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            children |= children_of(process.pid)
            assert time.monotonic() < deadline, "the server did not exit in time"
            time.sleep(0.01)
        assert process.returncode == 0
    assert wait_gone(children, STOP_S) == set()
    assert list(temp.glob("shardloss-*")) == []


@pytest.mark.slow
def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    """A call in flight keeps the server draining; a second signal ends it without waiting for the call."""
    with serving(tmp_path, "--local", "--drain-s", "600") as (process, address), shardloss.connect(address) as client:
        table = client.create_table("t", num_classes=5, dim=2)
        session = table.session()
        request = shardloss.messages.loss_request(
            "t", np.ones((1, 2), np.float32), np.array([0]), shardloss.FullSoftmax()
        )
        key = request.message
        key.session, key.step, key.after_step = session.name, 2, 1
        waiting = client.send_loss.future(request, timeout=500)
        wait_until_in_flight(client)
        process.send_signal(signal.SIGTERM)
        wait_not_serving(address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 128 + signal.SIGTERM
        waiting.cancel()


def wait_until_in_flight(client: shardloss.LossClient) -> None:
    """Poll until the waiting call has a ticket."""
    deadline = time.monotonic() + STOP_S
    while client.table("t").spec.num_open_tickets == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_not_serving(address: str) -> None:
    """Poll until the server accepts no new calls."""
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        try:
            shardloss.connect(address, timeout_s=0.5).close()
        except shardloss.ShardlossError:
            return
        time.sleep(0.02)
    raise AssertionError("the server went on serving after its signal")


def test_health_and_reflection_answer_on_both_ports(local_server: object) -> None:
    """Standard gRPC tools find the services and their health without the project's stubs."""
    for address in (local_server.address, local_server.admin_address):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(service="shardloss.v1.LossService"), timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=60))
            names = {service.name for service in answer.list_services_response.service}
            assert {"shardloss.v1.LossService", "shardloss.v1.TableService"} <= names


def test_a_taken_port_is_refused_in_one_line(local_server: object, tmp_path: Path) -> None:
    """A second server on the same port exits with 1 and a one-line error."""
    port = local_server.address.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "shardloss_server", "serve", "--local", "--port", port, "--admin-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_at_the_address_is_a_named_error() -> None:
    """connect gives up within its deadline with ServerUnavailable or DeadlineExceeded."""
    with pytest.raises(shardloss.errors.TransientError):
        shardloss.connect("127.0.0.1:1", timeout_s=0.5)


def test_a_unix_socket_serves_its_owner(tmp_path: Path) -> None:
    """The socket has mode 0600, serves in addition to the data port, and is removed when the server stops."""
    path = tmp_path / "shardloss"
    with serving(tmp_path, "--local", "--workers", "1", "--socket", str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with shardloss.connect(f"unix:{path}", timeout_s=30.0) as client:
            table = client.create_table("words", num_classes=5, dim=3)
            result = table.compute_loss(np.ones((2, 3), np.float32), np.array([0, 4]), shardloss.FullSoftmax())
        assert result.loss is not None
        assert result.loss.shape == (2,)
    assert not path.exists()
