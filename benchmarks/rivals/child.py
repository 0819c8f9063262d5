"""A second process of a rival, such as its server: it says one JSON line when ready, and ends when its stdin does.

Only the standard library, as `benchmarks.rivals.protocol`.
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
    """`python -m MODULE SHAPE server`, started; ready is what it said."""

    def __init__(self, module: str, shape: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", module, json.dumps(dict(shape)), "server"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.stop()
            raise RuntimeError(f"the server of {module} did not say that it is ready")
        self.ready: dict[str, Any] = json.loads(line)

    def peak_bytes(self) -> int:
        """The most that was resident in it so far."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

    def stop(self) -> None:
        """End it: its stdin ends, and it is killed where that is not enough. Idempotent."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve_child(ready: Mapping[str, Any], join: Callable[[], object] = lambda: None) -> None:
    """Say that the server is ready, do what waits for the parent in turn, and return when the parent is done."""
    answer(take_stdout(), ready)
    join()
    sys.stdin.read()


def main(make: Callable[[dict[str, Any]], Rival], run_server: Callable[[dict[str, Any]], None]) -> None:
    """Be the server where argv says so; else the rival, whose `close` ends what it has started."""
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
