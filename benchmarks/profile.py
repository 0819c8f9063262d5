"""A profile of one training step: trainer, wire, front end, fan-out, kernel and merge, with two floors to compare.

The service runs in this process, with `profile_timers` around the functions of its front end; the trainer is a separate
process. A step is one loss and one commit that do not overlap. Every part is a median over the steps; the difference
between their sum and the median step is reported as unaccounted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shardloss.allocator import keep_freed_memory
from shardloss_server.cluster.ray_group import RayGroup
from shardloss_server.config import ServerConfig
from shardloss_server.rpc.serve import Server

from benchmarks import report
from benchmarks.profile_timers import FAN_OUT, KERNEL, Parts, Timers
from benchmarks.rivals.shard_floor import Gemms, timed
from benchmarks.side import Answer, Side

NUM_WORKERS = 2
NUM_STEPS, TURN = 40, 5  # floors are measured between turns, so that the machine affects both alike
BYTES_PER_ELEMENT = 4
SHAPES: dict[str, dict[str, Any]] = {
    "full-100k": {"kind": "full", "N": 256, "D": 128, "V": 100_000, "K": 2, "optimizer": "sgd"},
    "sampled-4k": {"kind": "sampled", "N": 256, "D": 128, "V": 1_000_000, "S": 4096, "K": 2, "optimizer": "adagrad"},
}
FRONT_END = ("decode", "validate", "plan", "finish", "encode", "rest")


@dataclass(frozen=True, slots=True)
class Profile:
    """Medians of one shape's steps in ms. Parts are named "call: part", those of the trainer "client: part".

    flops_floor_ms: the three matrix products of one shard on one thread with nothing else running; both workers need
    this long, in parallel. bytes_floor_ms: hidden sent and as many bytes returned over a bare Unix socket.
    """

    name: str
    shape: dict[str, Any]
    num_steps: int
    step_ms: float
    parts: dict[str, float]
    flops_floor_ms: float
    bytes_floor_ms: float

    @property
    def unaccounted_ms(self) -> float:
        """Time of the step that the parts do not account for; negative if they exceed the step."""
        return self.step_ms - sum(self.parts.values())


def run(picture: Path, out: Path, num_steps: int = NUM_STEPS, shapes: Mapping[str, dict[str, Any]] = SHAPES) -> None:
    """Profile every shape, and write the figures and the picture."""
    from benchmarks import profile_picture

    profiles = []
    with Timers().installed() as timers, serving() as address:
        for name, shape in shapes.items():
            profiles.append(profile(name, {**shape, "address": address}, timers, num_steps))
    out.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(one), "unaccounted_ms": one.unaccounted_ms} for one in profiles]
    report.finished(out / "profile.json", json.dumps({"machine": report.machine(), "profiles": found}, indent=1) + "\n")
    profile_picture.draw(profiles, picture)


@contextmanager
def serving() -> Iterator[str]:
    """Run the service in this process and yield its address."""
    keep_freed_memory()
    torch.set_num_threads(1)
    group = RayGroup(NUM_WORKERS)
    try:
        server = Server(group, ServerConfig())
        server.start()
        yield server.address
        server.stop(0.0)
    finally:
        group.close()


def profile(name: str, shape: dict[str, Any], timers: Timers, num_steps: int) -> Profile:
    """Measure the steps of one shape in turns, and its floors between the turns."""
    n, d = int(shape["N"]), int(shape["D"])
    gemms = Gemms(torch.randn(num_columns(shape) // NUM_WORKERS, d), n)
    hidden = torch.randn(n, d)
    gemms.take_fastest(hidden)
    steps: list[Parts] = []
    gemm_ms: list[float] = []
    socket_ms: list[float] = []
    trained = {**shape, "dtype": "float32", "overlap": False}
    with (
        Side("ours_timed", trained, threads=1) as trainer,
        Side("unix_echo", {"bytes": BYTES_PER_ELEMENT * n * d}) as echo,
    ):
        trainer.ready()
        while len(steps) < num_steps:
            timers.take()
            steps += steps_of(trainer.step(TURN), timers.take())
            gemm_ms += [timed(lambda: gemms.step(hidden)) for _ in range(TURN)]
            socket_ms += echo.step(TURN).ms
    step_ms = median(step.pop("step") for step in steps)
    parts = {part: median(step.get(part, 0.0) for step in steps) for part in steps[0]}
    told = {key: value for key, value in trained.items() if key != "address"}
    return Profile(name, told, len(steps), step_ms, parts, median(gemm_ms), median(socket_ms))


def num_columns(shape: Mapping[str, Any]) -> int:
    """Return the number of classes in a step's matrix products: all, or the candidates."""
    return int(shape["V"] if shape["kind"] == "full" else shape["S"])


def steps_of(told: Answer, calls: Mapping[str, Sequence[Parts]]) -> list[Parts]:
    """Return one dict per step, from the times that the trainer and the front end each report.

    Raises:
        ValueError: they report different numbers of steps.
    """
    extra, count = told.extra, len(told.ms)
    if any(len(parts) != count for parts in calls.values()):
        raise ValueError(
            f"the trainer reports {count} steps, but the front end counted "
            f"{ ({call: len(parts) for call, parts in calls.items()}) }"
        )
    return [
        {
            "step": told.ms[i],
            "client: head": extra["loss_ms"][i] - extra["loss_rpc_ms"][i],
            **call_parts("loss", extra["loss_rpc_ms"][i], calls["loss"][i]),
            "client: backward": extra["backward_ms"][i],
            "client: step()": extra["commit_ms"][i] - extra["commit_rpc_ms"][i],
            **call_parts("commit", extra["commit_rpc_ms"][i], calls["commit"][i]),
        }
        for i in range(count)
    ]


def call_parts(call: str, rpc_ms: float, parts: Parts) -> Parts:
    """Return the parts of one call; the wire is the time that the trainer waits minus the time in the handler."""
    named = {f"{call}: {part}": parts.get(part, 0.0) for part in (*FRONT_END, FAN_OUT, KERNEL)}
    if call == "loss":
        named["loss: merge"] = parts.get("merge", 0.0)
    return {f"{call}: wire": rpc_ms - sum(parts.values()), **named}
