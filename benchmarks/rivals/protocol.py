"""The rival's end of the protocol: a process that builds one trainer and runs steps on demand.

It uses only the standard library, so that it runs in every rival's environment. The parent writes one JSON object per
line to stdin and reads one per line from stdout; all other output goes to stderr:

    (start)                     {"ready": true, "versions": {...}, "built_bytes": b, "rss_bytes": b}
    {"do": "step", "count": n}  {"ms": [n numbers], "extra": {"visible_ms": [n numbers], ...}}
    {"do": "memory"}            {"peak_bytes": b, "rss_bytes": b, "built_bytes": b}
    (end of stdin)              the process ends

built_bytes is the resident memory after building and before the first step. The answer to a failed request is
{"error": text}, and so is that to a failed start.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

WARM_STEPS = 3  # unless the shape has "warm_steps"


class Rival(Protocol):
    """A trainer that was built for one shape."""

    def versions(self) -> Mapping[str, str]:
        """Return the versions that the figures depend on, as {"torch": "2.13.0"}."""

    def step(self) -> Mapping[str, float] | None:
        """Run one whole training step, which the caller times.

        The numbers that it returns are appended to "extra", one list per name. It may return its own time as "ms", if
        something that is not part of the step must be left out.
        """


def serve(make: Callable[[dict[str, Any]], Rival]) -> None:
    """Build the rival of the shape in argv[1], warm it up, then answer requests on stdin until it closes."""
    answers = take_stdout()
    try:
        shape: dict[str, Any] = json.loads(sys.argv[1])
        rival = make(shape)
        built_bytes = memory_bytes("VmRSS")
        run_steps(rival, int(shape.get("warm_steps", WARM_STEPS)))
    except Exception as error:
        traceback.print_exc()
        answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    ready = {"ready": True, "versions": dict(rival.versions()), "built_bytes": built_bytes}
    answer(answers, {**ready, "rss_bytes": memory_bytes("VmRSS")})
    for line in sys.stdin:
        try:
            answer(answers, answer_of(rival, json.loads(line), built_bytes))
        except Exception as error:
            traceback.print_exc()
            answer(answers, {"error": f"{type(error).__name__}: {error}"})


def take_stdout() -> TextIO:
    """Return the real stdout, reserved for answers; anything that a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, value: Mapping[str, Any]) -> None:
    """Write an answer as one line and flush it."""
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def answer_of(rival: Rival, request: Mapping[str, Any], built_bytes: int) -> dict[str, Any]:
    """Return the answer to one request.

    Raises:
        ValueError: the request is unknown.
    """
    if request["do"] == "step":
        return run_steps(rival, int(request["count"]))
    if request["do"] == "memory":
        peak, rss = memory_bytes("VmHWM"), memory_bytes("VmRSS")
        return {"peak_bytes": peak, "rss_bytes": rss, "built_bytes": built_bytes}
    raise ValueError(f"do = {request['do']!r} is unknown: the requests are step and memory")


def run_steps(rival: Rival, count: int) -> dict[str, Any]:
    """Run steps one by one; return their times in ms, and the numbers that they returned by name."""
    times: list[float] = []
    extra: dict[str, list[float]] = {}
    for _ in range(count):
        start = time.perf_counter()
        returned = dict(rival.step() or {})
        times.append(returned.pop("ms", 1e3 * (time.perf_counter() - start)))
        for name, value in returned.items():
            extra.setdefault(name, []).append(float(value))
    finish = getattr(rival, "finish", None)  # work that steps leave pending counts towards the last step
    if finish is not None and times:
        start = time.perf_counter()
        finish()
        times[-1] += 1e3 * (time.perf_counter() - start)
    return {"ms": times, "extra": extra}


def memory_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise KeyError(field)
