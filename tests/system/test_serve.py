"""`shardloss-server serve`, run as an operator would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import shardloss
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.servers import START_S, STOP_S, children_of, started, wait_gone


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_local_server_serves_and_stops_cleanly(temp: Path, number: int) -> None:
    """The server writes its address when it is ready, answers calls, and exits with 0 on a signal."""
    with started(temp, "--local", "--workers", "1") as server:
        with shardloss.connect(server.address) as client:
            table = client.create_table("t", num_classes=11, dim=3)
            hidden = np.ones((2, 3), np.float32)
            result = table.session().train_step(hidden, np.array([1, 2]), shardloss.FullSoftmax(), learning_rate=0.1)
            assert result.committed is not None
            assert result.committed.version == 1
        server.process.send_signal(number)
        assert server.process.wait(STOP_S) == 0


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
    assert wait_gone(children) == set()
    assert list(temp.iterdir()) == []


@pytest.mark.slow
def test_a_second_signal_exits_at_once(temp: Path) -> None:
    """A call in flight keeps the server draining; a second signal ends it without waiting for the call."""
    with started(temp, "--local", "--drain-s", "600") as server, shardloss.connect(server.address) as client:
        table = client.create_table("t", num_classes=5, dim=2)
        session = table.session()
        request = shardloss.messages.loss_request(
            "t", np.ones((1, 2), np.float32), np.array([0]), shardloss.FullSoftmax()
        )
        key = request.message
        key.session, key.step, key.after_step = session.name, 2, 1
        waiting = client.send_loss.future(request, timeout=500)
        wait_until_in_flight(client)
        server.process.send_signal(signal.SIGTERM)
        wait_not_serving(server.address)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_S) == 128 + signal.SIGTERM
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


def test_a_unix_socket_serves_its_owner(temp: Path) -> None:
    """The socket has mode 0600, serves in addition to the data port, and is removed when the server stops."""
    path = temp / "shardloss"
    with started(temp, "--local", "--workers", "1", "--socket", str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with shardloss.connect(f"unix:{path}", timeout_s=30.0) as client:
            table = client.create_table("words", num_classes=5, dim=3)
            result = table.compute_loss(np.ones((2, 3), np.float32), np.array([0, 4]), shardloss.FullSoftmax())
        assert result.loss is not None
        assert result.loss.shape == (2,)
    assert not path.exists()
