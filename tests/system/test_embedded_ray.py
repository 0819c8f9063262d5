"""The Ray that a server starts for itself: private, drained, watched and removed."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shardloss

from tests.patience import eventually
from tests.servers import STOP_S, Started, children_of, listening_of, started, wait_gone

pytestmark = pytest.mark.ray
SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
NOTICE_S = 60.0  # seconds on a busy machine; `make test-stop` measures them


@pytest.fixture
def server(temp: Path) -> Started:
    """A running server with two workers, to which a hundredth of the machine's memory looks like too much.

    Its environment also has the settings of a user who works with Ray clusters, which say nothing about its own Ray.
    """
    clusters = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_REDIS_ADDRESS": "127.0.0.1:9", "RAY_gcs_storage": "redis"}
    others = {"RAY_USE_TLS": "1", "RAY_OVERRIDE_RESOURCES": "{", "RAY_AUTH_TOKEN": "another", "RAY_AUTH_MODE": "TOKEN"}
    environment = {"RAY_memory_usage_threshold": "0.01", **clusters, **others}
    with started(temp, "--workers", "2", environment=environment) as found:
        yield found


def test_a_stopping_server_answers_its_calls_and_leaves_nothing(server: Started) -> None:
    """SIGTERM with a call inside: the call is answered, the exit status is 0, and no process or file is left.

    The log says in one line that the server stops. Its processes listen where docs/security.md says, Ray's token is not
    the user's default one, and the memory that others use costs no worker.
    """
    children = children_of(server.process.pid)
    eventually(lambda: listening_of(server) == documented("serve --workers 2"), "the documented sockets")
    (folder,) = server.temp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    with shardloss.connect(server.address, timeout_s=STOP_S) as client:
        table = client.create_table("t", num_classes=200_000, dim=64)
        hidden, labels = np.ones((1024, 64), np.float32), np.zeros(1024, np.int64)
        answers: list[shardloss.types.Evaluation] = []
        asking = threading.Thread(target=lambda: answers.append(table.evaluate(hidden, labels)))
        asking.start()
        eventually(lambda: server.num_in_flight > 0, "the call to be inside")
        server.process.terminate()
        assert server.process.wait(STOP_S) == 0
        asking.join(STOP_S)
        assert np.isfinite(answers[0].loss).all()
    assert wait_gone(children) == set()
    assert list(server.temp.iterdir()) == []
    assert "worker 0" not in server.log
    assert "SIGTERM" not in server.log
    assert len(re.findall("stopping", server.log)) == 1


def test_a_server_without_ray_listens_on_its_two_ports(temp: Path) -> None:
    """docs/security.md lists every socket of `serve --local`, too."""
    with started(temp, "--local") as server:
        assert listening_of(server) == documented("serve --local")


def test_a_server_whose_terminal_is_closed_ends_in_order(temp: Path) -> None:
    """SIGHUP ends it as SIGTERM does."""
    with started(temp, "--local") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(STOP_S) == 0
        assert len(re.findall("stopping", server.log)) == 1
    assert not (temp / "ready").exists()


def documented(command: str) -> Counter[tuple[str, str]]:
    """Return the sockets that docs/security.md lists for a command, by process and address."""
    rows = SECURITY.read_text().split(f"### {command}\n", 1)[1].split("\n#", 1)[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")][2:]
    return Counter({(process, address): int(number) for process, address, number, _ in cells})


@pytest.mark.parametrize("name", ["gcs_server", pytest.param("raylet", marks=pytest.mark.slow)])
def test_a_server_whose_ray_dies_says_so_and_ends_in_order(server: Started, name: str) -> None:
    """Without its GCS or raylet a server could start no worker: it stops with status 1, to be started again.

    One line in the log names the process and the lost tables.
    """
    with shardloss.connect(server.address, timeout_s=STOP_S) as client:
        client.create_table("words", num_classes=11, dim=3)
    children = children_of(server.process.pid)
    os.kill(server.child(name), signal.SIGKILL)
    began = time.monotonic()
    assert server.process.wait(STOP_S) == 1
    assert time.monotonic() - began < NOTICE_S
    assert wait_gone(children) == set()
    assert list(server.temp.iterdir()) == []
    (line,) = [line for line in server.log.splitlines() if f"Ray's {name} has ended" in line]
    assert "lost with it: tables words" in line
