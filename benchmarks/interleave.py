"""Two sides measured in turns, ABAB..., never both at once: what the machine does to one it does to the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from benchmarks.side import Answer


class Stepper(Protocol):
    """What runs steps: a `Side`, or a loop in this process."""

    def step(self, count: int) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure: warm steps, then at least `counted` of each side, and more until `counted_s` a side.

    A comparison that has taken `cap_s` ends early, with what it has.
    """

    warm: int = 3
    counted: int = 20
    counted_s: float = 4.0
    turn_ms: float = 150.0
    max_counted: int = 400
    cap_s: float = 600.0


FULL = Plan()
QUICK = Plan(warm=1, counted=4, counted_s=0.3, turn_ms=50.0, max_counted=20, cap_s=10.0)


@dataclass
class Steps:
    """What was counted of one side: times in ms, and extra numbers by name."""

    ms: list[float] = field(default_factory=list)
    extra: dict[str, list[float]] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """Join one turn."""
        self.ms.extend(answer.ms)
        for name, values in answer.extra.items():
            self.extra.setdefault(name, []).extend(values)

    def median_of(self, name: str) -> float | None:
        """Median of an extra number; None where the side tells none."""
        values = self.extra.get(name)
        return median(values) if values else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides' counted steps; note says where a cap cut them."""

    ours: Steps
    rival: Steps
    note: str = ""

    @property
    def ratio(self) -> float:
        """Median of ours by the rival's."""
        return median(self.ours.ms) / median(self.rival.ms)


def interleave(
    ours: Stepper, rival: Stepper, plan: Plan = FULL, clock: Callable[[], float] = time.monotonic
) -> Comparison:
    """Warm both, then alternate turns of about plan.turn_ms until both have enough steps."""
    began = clock()
    sides = (ours, rival)
    counts = [turn_count(median(side.step(plan.warm).ms), plan.turn_ms) for side in sides]
    found = (Steps(), Steps())
    while not all(has_enough(steps, plan) for steps in found):
        if clock() - began > plan.cap_s and all(steps.ms for steps in found):
            least = min(len(steps.ms) for steps in found)
            return Comparison(*found, note=f"cut after {plan.cap_s:.0f} s at {least} steps")
        for side, steps, count in zip(sides, found, counts, strict=True):
            steps.add(side.step(count))
    return Comparison(*found)


def turn_count(step_ms: float, turn_ms: float) -> int:
    """Steps of one turn: about turn_ms of them, at least one."""
    return max(1, int(turn_ms / max(step_ms, 1e-3)))


def has_enough(steps: Steps, plan: Plan) -> bool:
    """At least plan.counted steps; short ones go on until plan.counted_s is full or plan.max_counted is reached."""
    count = len(steps.ms)
    return count >= plan.counted and (sum(steps.ms) >= 1e3 * plan.counted_s or count >= plan.max_counted)
