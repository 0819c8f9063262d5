"""Where the time of one training step goes: trainer, wire, front end, fan-out, kernel, merge, and two floors beside it.

The service runs in this process, with `profile_timers` around the functions of its front end; the trainer is a process
of its own. A step is one loss and one commit, none overlapping. Every part is a median over the steps; what they lack
of the median step is told as unaccounted.
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
NUM_STEPS, TURN = 40, 5  # the floors are measured between turns: what the machine does to one it does to the other
BYTES_PER_ELEMENT = 4
SHAPES: dict[str, dict[str, Any]] = {
    "full-100k": {"kind": "full", "N": 256, "D": 128, "V": 100_000, "K": 2, "optimizer": "sgd"},
    "sampled-4k": {"kind": "sampled", "N": 256, "D": 128, "V": 1_000_000, "S": 4096, "K": 2, "optimizer": "adagrad"},
}
FRONT_END = ("decode", "validate", "plan", "finish", "encode", "rest")


@dataclass(frozen=True, slots=True)
class Profile:
    """Medians of one shape's steps in ms. parts: "call: part", those of the trainer "client: part".

    flops_floor_ms: the three products of matrices of one shard, one thread, nothing else running; both workers take as
    long, at once. bytes_floor_ms: hidden there and as many bytes back over a bare Unix socket.
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
        """What the parts lack of the step; below 0 where they are too much."""
        return self.step_ms - sum(self.parts.values())


def run(picture: Path, out: Path, num_steps: int = NUM_STEPS, shapes: Mapping[str, dict[str, Any]] = SHAPES) -> None:
    """Profile every shape, and write the figures and their picture."""
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
    """The service in this process; its address."""
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
    """Steps of one shape in turns, with its floors between them."""
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
    """Classes that a step multiplies: all, or the candidates."""
    return int(shape["V"] if shape["kind"] == "full" else shape["S"])


def steps_of(told: Answer, calls: Mapping[str, Sequence[Parts]]) -> list[Parts]:
    """One dict a step, from what the trainer and the front end each say of it.

    Raises:
        ValueError: they do not speak of the same steps.
    """
    extra, count = told.extra, len(told.ms)
    if any(len(parts) != count for parts in calls.values()):
        raise ValueError(f"{count} steps, and calls { ({call: len(parts) for call, parts in calls.items()}) }")
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
    """Parts of one call; the wire is what the trainer waits beyond the time in the handler."""
    named = {f"{call}: {part}": parts.get(part, 0.0) for part in (*FRONT_END, FAN_OUT, KERNEL)}
    if call == "loss":
        named["loss: merge"] = parts.get("merge", 0.0)
    return {f"{call}: wire": rpc_ms - sum(parts.values()), **named}
