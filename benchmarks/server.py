"""The service as a process of its own: started, waited for, and always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.procfs import command_of, descendants_of
from benchmarks.side import ROOT, SideFailed

START_S = 120.0
STOP_S = 40.0
TAIL_CHARS = 600
WORKER = b"WorkerActor"  # in the process title that Ray gives an actor


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    address: str
    process: subprocess.Popen[bytes]

    def is_alive(self) -> bool:
        """Whether its front end still runs."""
        return self.process.poll() is None

    @property
    def front_pid(self) -> int:
        """The front end."""
        return self.process.pid

    def worker_pids(self) -> list[int]:
        """The processes that hold shards, ascending."""
        return sorted(pid for pid in descendants_of(self.process.pid) if WORKER in command_of(pid))


@contextmanager
def running(workers: int = 2, *, worker_threads: int = 1, keep_mib: int | None = None) -> Iterator[Service]:
    """Start the service on a free port; it has ended, with its workers, when the block is left.

    Raises:
        SideFailed: it ended or was silent instead of serving.
    """
    with TemporaryDirectory(prefix="bench-") as directory:
        ready, log = Path(directory) / "ready", Path(directory) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(workers, worker_threads, keep_mib, ready),
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(worker_threads)},
            )
            try:
                yield Service(wait_ready(process, ready, log), process)
            finally:
                stop(process)


def command(workers: int, worker_threads: int, keep_mib: int | None, ready: Path) -> list[str]:
    """How to start the service; keep_mib None is its default."""
    options = ["--workers", str(workers), "--worker-threads", str(worker_threads)]
    options += ["--port", "0", "--admin-port", "0", "--ready-file", str(ready)]
    if keep_mib is not None:
        options += ["--keep-mib", str(keep_mib)]
    return [sys.executable, "-m", "shardloss_server", "serve", *options, "--drain-s", "1"]


def wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    """The address that the service writes once it serves."""
    deadline = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None:
            raise SideFailed(f"the service ended with status {process.returncode}: {tail(log)}")
        if time.monotonic() > deadline:
            raise SideFailed(f"the service did not serve within {START_S:.0f} s: {tail(log)}")
        time.sleep(0.02)
    return ready.read_text()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service in order, then whatever is left in its process group; a second Ctrl-C does not cut this short."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        signal.signal(signal.SIGINT, previous)


def tail(log: Path) -> str:
    """The end of the service's log."""
    return log.read_text(errors="replace")[-TAIL_CHARS:].strip()
