"""A worker dies: calls on its tables raise RowsLost, and the service continues."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shardloss

from tests.servers import STOP_S, children_of, started, wait_gone


def shard_workers(server_pid: int) -> list[int]:
    """Return the pids of the Ray worker actors that a server has started."""
    return [pid for pid in children_of(server_pid) if b"ray::WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def repeat_for(seconds: float, call: Callable[[], object]) -> None:
    """Repeat the call until it raises or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        call()


@pytest.mark.ray
@pytest.mark.parametrize("path", ["--links", pytest.param("--no-links", marks=pytest.mark.slow)])
def test_a_killed_worker_is_a_named_error_new_tables_work_and_the_server_stops(temp: Path, path: str) -> None:
    """Calls raise RowsLost and never return a wrong result; new tables work; SIGTERM leaves no process and no file.

    This is true with links, which the new worker opens again, and with plain Ray calls.
    """
    hidden, labels = np.ones((3, 4), np.float32), np.array([0, 5, 10])
    with (
        started(temp, "--workers", "2", path) as server,
        shardloss.connect(server.address, timeout_s=200, attempt_timeout_s=20) as client,
    ):
        table = client.create_table("lost", num_classes=11, dim=4)
        session = table.session()
        session.train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
        victims = shard_workers(server.process.pid)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        with pytest.raises(shardloss.errors.RowsLost):
            repeat_for(200, lambda: table.compute_loss(hidden, labels, shardloss.FullSoftmax()))
        with pytest.raises(shardloss.errors.RowsLost):
            session.train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
        client.delete_table("lost")
        again = client.create_table("lost", num_classes=11, dim=4)
        result = again.session().train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
        assert result.committed is not None
        assert result.committed.version == 1
        children = children_of(server.process.pid)
        server.process.terminate()
        assert server.process.wait(STOP_S) == 0
    assert wait_gone(children) == set()
    assert list(server.temp.iterdir()) == []
