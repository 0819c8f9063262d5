"""The service that the demo uses: a process of its own, which is always stopped, or one that is already running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import shardloss

START_S = 120.0
STOP_S = 30.0
TAIL_LINES = 15


class ServiceFailed(Exception):
    """Failure of the service to start; the message includes the end of its log."""


@contextmanager
def running(num_workers: int, log: Path) -> Iterator[str]:
    """Start the service and yield its address; stop it and its workers when the block ends.

    Raises:
        ServiceFailed: the service exited, or was not ready in time.
    """
    with TemporaryDirectory(prefix="cities-") as directory, log.open("wb") as out:
        ready = Path(directory) / "ready"
        # In a session of its own, so that Ctrl-C reaches only the demo, which then shuts the service down.
        process = subprocess.Popen(
            command(num_workers, ready), stdout=out, stderr=out, start_new_session=True, env=environment()
        )
        try:
            yield wait_ready(process, ready, log)
        finally:
            stop(process)


def connected(address: str) -> shardloss.LossClient:
    """Connect to the service at address with the token in SHARDLOSS_TOKEN_FILE, as the command line does.

    Raises:
        shardloss.ShardlossError: no service answers at the address, or it rejects the token.
    """
    return shardloss.connect(
        address,
        token_file=os.environ.get("SHARDLOSS_TOKEN_FILE"),
        ca_file=os.environ.get("SHARDLOSS_CA_FILE"),
        allow_plaintext_token=os.environ.get("SHARDLOSS_ALLOW_PLAINTEXT_TOKEN", "").lower() in ("1", "true", "yes"),
    )


def forget(client: shardloss.LossClient, table: str) -> None:
    """Delete the table of an earlier run, if there is one, so that this run starts from scratch."""
    with suppress(shardloss.errors.TableNotFound):
        client.delete_table(table)


def command(num_workers: int, ready: Path) -> list[str]:
    """Return the command that starts the service on a free port."""
    options = [
        "--port",
        "0",
        "--admin-port",
        "0",
        "--workers",
        str(num_workers),
        "--ready-file",
        str(ready),
        "--drain-s",
        "1",
    ]
    return [sys.executable, "-m", "shardloss_server", "serve", *options]


def environment() -> dict[str, str]:
    """Return the service's environment: one thread per worker, because threads beyond the cores only wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    """Wait until the service is ready and return the address that it writes.

    Raises:
        ServiceFailed: the service exited, or was not ready within START_S.
    """
    deadline = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None:
            raise ServiceFailed(f"the service exited with status {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"the service was not ready within {START_S:.0f} s:\n{tail(log)}")
        time.sleep(0.05)
    return ready.read_text()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Shut the service down, then kill what is left of its process group. A second Ctrl-C does not interrupt this."""
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
    """Return the last lines of the service's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
