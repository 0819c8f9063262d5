"""One row of the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from benchmarks.goals import Goal, goal_of
from benchmarks.interleave import Comparison


@dataclass(frozen=True, slots=True)
class Row:
    """Ours against one rival at one shape {N, D, V, S, K, dtype}; fields that do not apply are None.

    Times are per step: ms is the median, min_ms the minimum. visible_ms is the time that the trainer waits if the
    commit runs in parallel. wire_bytes are per step, both ways; peak bytes are what steps need beyond what was built.
    reason says why there is no figure.
    """

    scenario: str
    rival: str
    shape: Mapping[str, Any]
    ours_ms: float | None = None
    rival_ms: float | None = None
    ours_min_ms: float | None = None
    rival_min_ms: float | None = None
    ratio: float | None = None
    visible_ms: float | None = None
    visible_ratio: float | None = None
    wire_bytes: float | None = None
    wire_bytes_rival: float | None = None
    peak_bytes_ours: int | None = None
    peak_bytes_rival: int | None = None
    steps: int = 0
    note: str = ""
    reason: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    day: str = ""  # when it was measured

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity of the row, which is the same in every run."""
        return self.scenario, self.rival, str(sorted(self.shape.items()))

    @property
    def goal(self) -> Goal:
        return goal_of(self.scenario, self.rival)

    @property
    def wire_ratio(self) -> float | None:
        """Bytes of ours divided by the rival's; None if unknown."""
        if self.wire_bytes is None or not self.wire_bytes_rival:
            return None
        return self.wire_bytes / self.wire_bytes_rival

    def measured(self) -> list[tuple[str, float | None, float]]:
        """Return (name, measured value, upper limit) of everything that the row has a goal for."""
        goal = self.goal
        pairs = (
            ("time", self.ratio, goal.ratio),
            ("visible latency", self.visible_ratio, goal.visible),
            ("bytes on the wire", self.wire_ratio, goal.wire),
            ("extra bytes of a shard", self.peak_bytes_ours, goal.peak_bytes),
        )
        return [(name, reached, most) for name, reached, most in pairs if most is not None]

    @property
    def met(self) -> bool | None:
        """True if every goal of the row is reached; None without goals or figures."""
        pairs = self.measured()
        if self.reason is not None or not pairs:
            return None
        return all(reached is not None and reached <= most for _, reached, most in pairs)

    def as_json(self) -> dict[str, Any]:
        """Return the row as stored in results.json."""
        goal = self.goal
        return {
            **asdict(self),
            "wire_ratio": self.wire_ratio,
            "goal": goal.ratio,
            "visible_goal": goal.visible,
            "wire_goal": goal.wire,
            "peak_bytes_goal": goal.peak_bytes,
            "stretch": goal.is_stretch,
            "met": self.met,
        }

    def but(self, **changes: Any) -> Row:
        """Return the row with some fields changed."""
        return replace(self, **changes)


def row_of_json(found: Mapping[str, Any]) -> Row:
    """Return the row that `Row.as_json` wrote."""
    names = Row.__dataclass_fields__
    return Row(**{name: value for name, value in found.items() if name in names})


def compared(scenario: str, rival: str, shape: Mapping[str, Any], found: Comparison, **more: Any) -> Row:
    """Return the row of a comparison, with visible_ms and wire_bytes from the sides' extra numbers."""
    visible, rival_ms = found.ours.median_of("visible_ms"), median(found.rival.ms)
    row = Row(
        scenario,
        rival,
        dict(shape),
        ours_ms=median(found.ours.ms),
        rival_ms=rival_ms,
        ours_min_ms=min(found.ours.ms),
        rival_min_ms=min(found.rival.ms),
        ratio=found.ratio,
        visible_ms=visible,
        visible_ratio=None if visible is None else visible / rival_ms,
        wire_bytes=found.ours.median_of("wire_bytes"),
        wire_bytes_rival=found.rival.median_of("wire_bytes"),
        steps=min(len(found.ours.ms), len(found.rival.ms)),
        note="; ".join(filter(None, (more.pop("note", ""), found.note))),
    )
    return row.but(**more)


def missing(scenario: str, rival: str, shape: Mapping[str, Any], reason: str) -> Row:
    """Return the row of a rival that could not be measured, with the reason."""
    return Row(scenario, rival, dict(shape), reason=reason)
