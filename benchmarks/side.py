"""The parent's end of the protocol: a measured side is a process, and every wait for it has a deadline."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
START_S = 300.0  # includes the compile time of torch.compile
STEPS_S = 600.0
ANSWER_S = 15.0
END_S = 60.0  # ours deletes its table first
TAIL_CHARS = 600


class SideFailed(Exception):
    """Failure to start or to run a side; the message becomes its row's reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Times of some steps in ms, and the other numbers that each step reported."""

    ms: list[float]
    extra: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes: the peak so far, now, and after building but before the first step."""

    peak_bytes: int
    rss_bytes: int
    built_bytes: int

    @property
    def extra_bytes(self) -> int:
        """Bytes that steps needed beyond what was built."""
        return self.peak_bytes - self.built_bytes


def python_of(environment: str | None) -> str:
    """Return the interpreter of `.venv-ENVIRONMENT`, or this one if environment is None.

    Raises:
        SideFailed: the environment was not created.
    """
    if environment is None:
        return sys.executable
    python = ROOT / f".venv-{environment}" / "bin" / "python"
    if not python.exists():
        raise SideFailed(f"{python.parent.parent.name} does not exist: run `make bench-setup`")
    return str(python)


class Side:
    """A process with a trainer. It starts immediately; `ready` and every request wait until it is built and warm."""

    def __init__(
        self,
        name: str,
        shape: Mapping[str, Any],
        *,
        threads: int = 2,
        environment: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.shape, self.versions = name, dict(shape), dict[str, str]()
        self._unread, self._is_ready = b"", False
        command = [python_of(environment), "-m", f"benchmarks.rivals.{name}", json.dumps(self.shape)]
        self._errors: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **(variables or {})},
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self, timeout_s: float = START_S) -> Side:
        """Wait until the process is built and warm.

        Raises:
            SideFailed: it failed, or was not ready within timeout_s.
        """
        if not self._is_ready:
            self.versions = {str(k): str(v) for k, v in self._read(timeout_s)["versions"].items()}
            self._is_ready = True
        return self

    def step(self, count: int, timeout_s: float = STEPS_S) -> Answer:
        """Run count steps.

        Raises:
            SideFailed: a step failed, or the steps took longer than timeout_s.
        """
        found = self._ask({"do": "step", "count": count}, timeout_s)
        return Answer(found["ms"], found.get("extra", {}))

    def memory(self) -> Memory:
        """Return the resident memory of the process."""
        return Memory(**self._ask({"do": "memory"}, ANSWER_S))

    def close(self) -> None:
        """End the process by closing its stdin; kill it if it does not exit. Idempotent."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S if self._is_ready else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._errors.close()

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self.ready()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # reading the answer will report it
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout_s))
        if "error" in found:
            raise SideFailed(f"{self.name}: {found['error']}")
        return found

    def _line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise SideFailed(f"{self.name} did not answer in time: {self._tail()}")
            read = os.read(pipe, 1 << 20)
            if not read:
                raise SideFailed(f"{self.name} exited: {self._tail()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _tail(self) -> str:
        """Return the end of the process's stderr, or only its last line if it is a traceback."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        return text.splitlines()[-1] if "Traceback" in text[-4 * TAIL_CHARS :] else text[-TAIL_CHARS:]
