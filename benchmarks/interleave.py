"""Two sides measured in turns, ABAB..., never both at once, so that the machine affects both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from benchmarks.side import Answer


class Stepper(Protocol):
    """A runner of steps: a `Side`, or a loop in this process."""

    def step(self, count: int) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The length of a measurement: warm steps, then at least `counted` per side, and more until `counted_s` per side.

    A comparison that has taken `cap_s` ends early, with the steps counted so far.
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
    """The counted steps of one side: times in ms, and extra numbers by name."""

    ms: list[float] = field(default_factory=list)
    extra: dict[str, list[float]] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """Add the steps of one turn."""
        self.ms.extend(answer.ms)
        for name, values in answer.extra.items():
            self.extra.setdefault(name, []).extend(values)

    def median_of(self, name: str) -> float | None:
        """Return the median of an extra number, or None if the side does not report it."""
        values = self.extra.get(name)
        return median(values) if values else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The counted steps of both sides; note says if a cap ended the comparison early."""

    ours: Steps
    rival: Steps
    note: str = ""

    @property
    def ratio(self) -> float:
        """Median of ours divided by the median of the rival's."""
        return median(self.ours.ms) / median(self.rival.ms)


def interleave(
    ours: Stepper, rival: Stepper, plan: Plan = FULL, clock: Callable[[], float] = time.monotonic
) -> Comparison:
    """Warm up both sides, then alternate turns of about plan.turn_ms until both have enough steps."""
    began = clock()
    sides = (ours, rival)
    counts = [turn_count(median(side.step(plan.warm).ms), plan.turn_ms) for side in sides]
    found = (Steps(), Steps())
    while not all(has_enough(steps, plan) for steps in found):
        if clock() - began > plan.cap_s and all(steps.ms for steps in found):
            least = min(len(steps.ms) for steps in found)
            return Comparison(*found, note=f"stopped after {plan.cap_s:.0f} s at {least} steps")
        for side, steps, count in zip(sides, found, counts, strict=True):
            steps.add(side.step(count))
    return Comparison(*found)


def turn_count(step_ms: float, turn_ms: float) -> int:
    """Return the number of steps that take about turn_ms, at least one."""
    return max(1, int(turn_ms / max(step_ms, 1e-3)))


def has_enough(steps: Steps, plan: Plan) -> bool:
    """Return True after plan.counted steps that took plan.counted_s together, or after plan.max_counted steps."""
    count = len(steps.ms)
    return count >= plan.counted and (sum(steps.ms) >= 1e3 * plan.counted_s or count >= plan.max_counted)
