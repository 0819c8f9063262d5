"""The service as a separate process: started, waited for, and always stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.procfs import command_of, descendants_of
from benchmarks.side import ROOT, SideFailed
from examples.cities.service import ServiceFailed, stop, wait_ready

WORKER = b"WorkerActor"  # in the process title that Ray gives an actor


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    address: str
    process: subprocess.Popen[bytes]

    def is_alive(self) -> bool:
        """Return True if the front end is still running."""
        return self.process.poll() is None

    @property
    def front_pid(self) -> int:
        """Process id of the front end."""
        return self.process.pid

    def worker_pids(self) -> list[int]:
        """Return the ids of the processes that hold shards, ascending."""
        return sorted(pid for pid in descendants_of(self.process.pid) if WORKER in command_of(pid))


@contextmanager
def running(workers: int = 2, *, worker_threads: int = 1, keep_mib: int | None = None) -> Iterator[Service]:
    """Start the service on a free port; stop it and its workers when the block ends.

    Raises:
        SideFailed: the service exited, or was not ready in time.
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
            except ServiceFailed as error:
                raise SideFailed(str(error)) from error
            finally:
                stop(process)


def command(workers: int, worker_threads: int, keep_mib: int | None, ready: Path) -> list[str]:
    """Return the command that starts the service; keep_mib None leaves the service's default."""
    options = ["--workers", str(workers), "--worker-threads", str(worker_threads)]
    options += ["--port", "0", "--admin-port", "0", "--ready-file", str(ready)]
    if keep_mib is not None:
        options += ["--keep-mib", str(keep_mib)]
    return [sys.executable, "-m", "shardloss_server", "serve", *options, "--drain-s", "1"]
