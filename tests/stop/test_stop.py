"""How a server ends: by a signal with long calls inside, or because a process is killed. Measured and printed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import shardloss

from tests.patience import eventually
from tests.servers import STOP_S, Started, children_of, is_gone, started, wait_gone

pytestmark = [pytest.mark.stop, pytest.mark.timeout(1800)]
ROUNDS = int(os.environ.get("SHARDLOSS_STOP_ROUNDS", "20"))
CALLS_S = (1.0, 5.0, 9.0)
DRAIN_S = "100"  # the calls share two cores, perhaps with other work; the default of 10 s is for one such call
V, D, CALIBRATION_ROWS = 800_000, 64, 64
PAGE_ROWS = 2048  # of an exact question: more would be a second call, which a stopping server refuses
GCS, RAYLET, WORKER, FRONT_END = "gcs_server", "raylet", "ray::WorkerActor", "front end"


@dataclass(slots=True)
class Call:
    """A call of about `seconds`, in a thread of its own, over a connection of its own."""

    address: str
    num_rows: int
    losses: list[float] = field(default_factory=list)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        with shardloss.connect(self.address, timeout_s=STOP_S) as client:
            self.losses.extend(evaluated(client, self.num_rows))


def evaluated(client: shardloss.LossClient, num_rows: int) -> list[float]:
    """Evaluate rows of ones exactly, in one call."""
    hidden, labels = np.ones((num_rows, D), np.float32), np.zeros(num_rows, np.int64)
    return client.table("t").evaluate(hidden, labels).loss.tolist()


@pytest.mark.parametrize("workers", [("--workers", "2"), ("--local", "--workers", "2")], ids=["ray", "local"])
@pytest.mark.parametrize("number", range(ROUNDS))
def test_calls_inside_are_answered_and_nothing_is_left(temp: Path, workers: tuple[str, ...], number: int) -> None:
    """SIGTERM with calls of 1, 5 and 9 s inside: they are answered, the exit status is 0, and nothing is left."""
    shared_memory = set(os.listdir("/dev/shm"))
    socket = temp / "socket"
    with started(temp, *workers, "--drain-s", DRAIN_S, "--socket", str(socket)) as server:
        with shardloss.connect(server.address, timeout_s=STOP_S) as client:
            client.create_table("t", num_classes=V, dim=D)
            evaluated(client, 8)
            began = time.monotonic()
            evaluated(client, CALIBRATION_ROWS)
            rows_a_second = CALIBRATION_ROWS / (time.monotonic() - began)
        num_rows = [round(seconds * rows_a_second) for seconds in CALLS_S]
        assert max(num_rows) < PAGE_ROWS, "a faster machine needs a larger table"
        calls = [Call(server.address, max(1, number)) for number in num_rows]
        eventually(lambda: server.num_in_flight == len(calls), "the calls to be inside")
        children = children_of(server.process.pid)
        server.process.terminate()
        told = time.monotonic()
        assert server.process.wait(STOP_S) == 0, server.log
        took_s = time.monotonic() - told
        for call in calls:
            call.thread.join(STOP_S)
            assert len(call.losses) == call.num_rows
            assert np.isfinite(call.losses).all()
        assert wait_gone(children) == set()
        left = [*server.temp.iterdir(), *(path for path in (socket, temp / "ready") if path.exists())]
        assert left == []
    assert "SIGTERM" not in server.log
    assert "Traceback" not in server.log
    assert set(os.listdir("/dev/shm")) <= shared_memory
    print(f"{workers[0]} {number}: ended {took_s:.1f} s after the signal")


@dataclass(slots=True)
class Seen:
    """What is seen after a process is killed: seconds until it is noticed, health, exit status and what is left."""

    killed: str
    noticed_s: float = float("nan")
    health: str = ""
    exit_status: str = ""
    ended_s: float = float("nan")
    log: str = ""
    left: str = ""

    def row(self) -> str:
        """Return the figures as a row of the table in docs/operations.md."""
        ended = "" if np.isnan(self.ended_s) else f" after {self.ended_s:.1f} s"
        cells = self.killed, f"{self.noticed_s:.1f} s", self.health, self.log, f"{self.exit_status}{ended}", self.left
        return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def seen() -> Iterator[list[Seen]]:
    """The rows of the table, printed at the end."""
    rows: list[Seen] = []
    yield rows
    print("\n\n| killed | noticed after | health | log | exit status | left |\n|---|---|---|---|---|---|")
    print("\n".join(row.row() for row in rows))


@pytest.mark.parametrize("killed", [GCS, RAYLET, WORKER, FRONT_END])
def test_the_death_of_a_process_is_noticed_and_leaves_nothing(temp: Path, seen: list[Seen], killed: str) -> None:
    """SIGKILL of each process: noticed within seconds; a server that cannot go on ends with 1, so that it is restarted.

    A dead worker costs its rows alone. Whatever a killed front end leaves, the next start removes.
    """
    row = Seen(killed)
    with started(temp, "--workers", "2") as server, shardloss.connect(server.address, timeout_s=STOP_S) as client:
        table = client.create_table("words", num_classes=11, dim=3)
        children = children_of(server.process.pid)
        os.kill(server.process.pid if killed == FRONT_END else server.child(killed), signal.SIGKILL)
        began = time.monotonic()
        while row.noticed_s != row.noticed_s:
            if killed == WORKER and is_lost(table):
                row.noticed_s, row.health = time.monotonic() - began, server.health
            elif killed != WORKER and (health := server.health) != "SERVING":
                row.noticed_s, row.health = time.monotonic() - began, health
            assert time.monotonic() - began < STOP_S
        if killed == WORKER:
            server.process.terminate()
        status = server.process.wait(STOP_S)
        row.exit_status, row.ended_s = str(status), time.monotonic() - began
        row.log = lines_of(server, "[error" if killed in (GCS, RAYLET) else "[warning")
        gone = wait_gone(children) == set()
        row.left = ", ".join(sorted(path.name for path in server.temp.iterdir())) or "nothing"
        row.left += f"; all processes ended within {time.monotonic() - began:.1f} s" if gone else "; processes"
        assert gone
        assert row.noticed_s < 10
        assert status == {GCS: 1, RAYLET: 1, WORKER: 0, FRONT_END: -signal.SIGKILL}[killed]
    if killed == FRONT_END:
        assert removed_by_the_next_start(server.temp)
        row.left += ", and the next start removes the folder"
    else:
        assert list(server.temp.iterdir()) == []
    seen.append(row)


def is_lost(table: shardloss.Table) -> bool:
    """Return True if a call on the table says that its rows are lost."""
    try:
        table.read_rows(np.arange(11))
    except shardloss.errors.RowsLost:
        return True
    except shardloss.errors.TransientError:
        return False
    return False


def lines_of(server: Started, level: str) -> str:
    """Return the log's lines of one level, without their time and logger."""
    found = [line.split("] ", 1)[1].rsplit(" [", 1)[0] for line in server.log.splitlines() if level in line]
    return "; ".join(found) or "nothing"


def removed_by_the_next_start(tmpdir: Path) -> bool:
    """Start and stop another server with the same TMPDIR, and return True if nothing is left in it."""
    with TemporaryDirectory(prefix="t-") as folder, started(Path(folder), "--workers", "1", tmpdir=tmpdir) as server:
        children = children_of(server.process.pid)
        server.process.terminate()
        assert server.process.wait(STOP_S) == 0
        assert all(is_gone(pid) for pid in children)
    return list(tmpdir.iterdir()) == []
