"""The service: as this demo's own process, started, waited for and always stopped; or one that is there already."""

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
    """The service did not come up; the message holds the end of its log."""


@contextmanager
def running(num_workers: int, log: Path) -> Iterator[str]:
    """Start the service and yield its address; it has ended, with its workers, when the block is left.

    Raises:
        ServiceFailed: it ended or was silent instead of serving.
    """
    with TemporaryDirectory(prefix="cities-") as directory, log.open("wb") as out:
        ready = Path(directory) / "ready"
        # A session of its own: Ctrl-C reaches the demo alone, which then stops the service in order.
        process = subprocess.Popen(
            command(num_workers, ready), stdout=out, stderr=out, start_new_session=True, env=environment()
        )
        try:
            yield wait_ready(process, ready, log)
        finally:
            stop(process)


def connected(address: str) -> shardloss.LossClient:
    """A client of the service at address, with the token that SHARDLOSS_TOKEN_FILE names, as the command line takes it.

    Raises:
        shardloss.ShardlossError: no service answers there, or it does not take the token.
    """
    return shardloss.connect(
        address,
        token_file=os.environ.get("SHARDLOSS_TOKEN_FILE"),
        ca_file=os.environ.get("SHARDLOSS_CA_FILE"),
        allow_plaintext_token=os.environ.get("SHARDLOSS_ALLOW_PLAINTEXT_TOKEN", "").lower() in ("1", "true", "yes"),
    )


def forget(client: shardloss.LossClient, table: str) -> None:
    """Delete what an earlier run has left: this one begins anew."""
    with suppress(shardloss.errors.TableNotFound):
        client.delete_table(table)


def command(num_workers: int, ready: Path) -> list[str]:
    """How to start the service on a free port."""
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
    """One thread a worker: more of them than cores only wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    """The address that the service writes once it serves."""
    deadline = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None:
            raise ServiceFailed(f"the service ended with status {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"the service did not serve within {START_S:.0f} s:\n{tail(log)}")
        time.sleep(0.05)
    return ready.read_text()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service in order, then all that is left in its process group. A second Ctrl-C does not cut this short."""
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
    """The last lines of the service's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
