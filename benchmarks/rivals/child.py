"""A second process of a rival, such as its server: it writes one JSON line when ready, and ends when its stdin closes.

It uses only the standard library, like `benchmarks.rivals.protocol`.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from benchmarks.rivals.protocol import Rival, answer, serve, take_stdout

START_S = 120.0
STOP_S = 10.0


class Child:
    """A started `python -m MODULE SHAPE server`; ready is the JSON object that it wrote."""

    def __init__(self, module: str, shape: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", module, json.dumps(dict(shape)), "server"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.stop()
            raise RuntimeError(f"the server of {module} did not report that it is ready")
        self.ready: dict[str, Any] = json.loads(line)

    def peak_bytes(self) -> int:
        """Return the peak resident memory of the process so far, in bytes."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

    def stop(self) -> None:
        """End the process by closing its stdin; kill it if that is not enough. Idempotent."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve_child(ready: Mapping[str, Any], join: Callable[[], object] = lambda: None) -> None:
    """Report that the server is ready, call join, which may wait for the parent, and return when the parent is done."""
    answer(take_stdout(), ready)
    join()
    sys.stdin.read()


def main(make: Callable[[dict[str, Any]], Rival], run_server: Callable[[dict[str, Any]], None]) -> None:
    """Run the server if argv says so, else the rival, whose `close` ends the server that it started."""
    if sys.argv[2:] == ["server"]:
        run_server(json.loads(sys.argv[1]))
        return
    made: list[Any] = []

    def kept(shape: dict[str, Any]) -> Rival:
        made.append(make(shape))
        return cast(Rival, made[-1])

    try:
        serve(kept)
    finally:
        for rival in made:
            rival.close()
