"""The benchmark counts, merges and reports as documented; nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, soak
from benchmarks.goals import GOALS
from benchmarks.interleave import Comparison, Plan, Steps, has_enough, interleave, turn_count
from benchmarks.row import Row, compared, missing, row_of_json
from benchmarks.side import Answer, Side, SideFailed

SHAPE = {"N": 7, "D": 5, "V": 11, "S": None, "K": 2, "dtype": "float32"}


class Fixed:
    """A side whose steps all take the same time, and which records its turns in a shared diary."""

    def __init__(self, name: str, ms: float, diary: list[tuple[str, int]], **extra: float) -> None:
        self.name, self.ms, self.diary, self.extra = name, ms, diary, extra

    def step(self, count: int) -> Answer:
        self.diary.append((self.name, count))
        return Answer([self.ms] * count, {name: [value] * count for name, value in self.extra.items()})


def test_sides_take_turns_after_their_warm_steps():
    """The sides alternate in turns of about turn_ms, and warm steps are not counted."""
    diary: list[tuple[str, int]] = []
    plan = Plan(warm=3, counted=6, counted_s=0.0, turn_ms=100.0)
    found = interleave(Fixed("a", 40.0, diary), Fixed("b", 400.0, diary), plan)
    assert diary[:2] == [("a", 3), ("b", 3)]
    assert diary[2:] == [("a", 2), ("b", 1)] * 6  # b needs six turns of one step each
    assert (len(found.ours.ms), len(found.rival.ms)) == (12, 6)
    assert found.ratio == pytest.approx(0.1)
    assert found.note == ""


def test_a_comparison_above_its_cap_ends_early_and_says_so():
    ticks = iter(range(0, 10_000, 7))
    plan = Plan(counted=20, counted_s=0.0, turn_ms=1.0, cap_s=30.0)
    found = interleave(Fixed("a", 5e3, []), Fixed("b", 9e3, []), plan, clock=lambda: float(next(ticks)))
    assert 0 < len(found.ours.ms) < 20
    assert f"at {len(found.ours.ms)} steps" in found.note


def test_a_turn_has_at_least_one_step():
    assert [turn_count(ms, 150.0) for ms in (0.0, 1.0, 149.0, 151.0, 1e5)] == [150_000, 150, 1, 1, 1]


def test_short_steps_are_counted_for_longer():
    """Twenty steps of a millisecond are too few: steps are counted until counted_s or max_counted is reached."""
    plan = Plan(counted=20, counted_s=1.0, max_counted=100)
    assert not has_enough(Steps([1.0] * 20), plan)
    assert has_enough(Steps([1.0] * 100), plan)
    assert has_enough(Steps([60.0] * 20), plan)
    assert not has_enough(Steps([600.0] * 19), plan)


def row(ratio: float, scenario: str = "full-100k", rival: str = "torch.compile") -> Row:
    found = Comparison(Steps([100 * ratio] * 3), Steps([100.0] * 3))
    return compared(scenario, rival, SHAPE, found, versions={"torch": "9"})


def test_a_row_is_met_where_every_goal_of_it_is():
    assert row(0.80).met is True
    assert row(0.81).met is False
    eager = row(0.5, rival="eager torch")
    assert eager.met is False, "its visible latency was not measured"
    assert eager.but(visible_ratio=0.4).met is True
    assert row(0.5, rival="nobody asked").met is None
    assert missing("full-100k", "torch.compile", SHAPE, "no compiler").met is None


def test_bytes_have_goals_of_their_own():
    server = row(0.5, "parameter-server", "torch.distributed.rpc")
    assert server.but(wire_bytes=1.0, wire_bytes_rival=10.0).met is True
    assert server.but(wire_bytes=1.1, wire_bytes_rival=10.0).met is False
    memory = Row("full-1M-memory", "eager torch", SHAPE, peak_bytes_ours=64_000_000)
    assert memory.met is True
    assert memory.but(peak_bytes_ours=64_000_001).met is False


def test_what_a_side_tells_beside_its_times_goes_into_the_row():
    ours = Steps([50.0] * 3, {"visible_ms": [10.0, 20.0, 90.0], "wire_bytes": [5.0, 5.0, 7.0]})
    found = compared("full-100k", "eager torch", SHAPE, Comparison(ours, Steps([100.0] * 4), "cut"), note="by hand")
    assert (found.visible_ms, found.visible_ratio, found.wire_bytes, found.steps) == (20.0, 0.2, 5.0, 3)
    assert found.note == "by hand; cut"


def test_a_full_run_names_every_goal_without_a_row():
    """A goal without a row, because a row was dropped or its name matches no goal, is listed in the report."""
    assert len(report.absent([])) == len(GOALS)
    lines = report.absent([row(0.9), row(0.9, "full-lce", "another name")])
    assert len(lines) == len(GOALS) - 1
    assert not any(line.startswith("- full-100k, torch.compile") for line in lines)
    assert lines[-1] in report.markdown([row(0.5)], "a machine", is_quick=False)


def test_results_are_read_back_and_one_scenario_replaces_its_own_rows(tmp_path: Path):
    first = [row(0.9), row(0.7, "full-lce", "x"), missing("nodes", "one node", SHAPE, "needs | root\nrights")]
    report.write(first, tmp_path, ["full-100k", "full-lce"], is_quick=True)
    again = report.read(tmp_path)
    assert again == first
    assert report.merged(again, "full-lce", [row(0.6, "full-lce", "y")]) == [
        first[0],
        first[2],
        row(0.6, "full-lce", "y"),
    ]
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    found = json.loads((tmp_path / "results.json").read_text())
    assert [entry["goal"] for entry in found] == [0.8, None, None]
    assert [entry["met"] for entry in found] == [False, None, None]
    assert row_of_json(found[0]) == first[0]


def test_the_page_says_what_was_missed_and_by_how_much():
    rows = [row(0.88), missing("full-lce", "F.linear_cross_entropy, default options", SHAPE, "no | such\nthing")]
    rows = [rows[0].but(day="2024-06-07"), rows[1].but(day="2024-06-09")]
    page = report.markdown(rows, "a machine", is_quick=True)
    assert "2024-06-07 to 2024-06-09" in page
    assert "time 0.88, goal 0.8: 10% over" in page
    assert "no figure. no / such thing" in page
    lengths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert lengths == {len(report.HEADER) + 1}
    assert "Every goal is met." in report.markdown([row(0.5)], "a machine", is_quick=True)


def test_a_soak_counts_the_slope_of_its_last_four_fifths():
    steps = list(range(100, 1100, 100))
    grows = [900_000_000, 0, *(2000 * step for step in steps[2:])]  # growth in the first fifth is not counted
    assert soak.slope(steps, grows) == pytest.approx(2000.0)
    samples = {"steps": steps, "/dev/shm": [3, 3] + [10] * 8, "client": [5] * 10, "worker 0": [900 * n for n in steps]}
    assert soak.judged(samples)["met"] is True
    assert soak.judged({**samples, "/dev/shm": [10] * 9 + [11]})["met"] is False
    assert soak.judged({**samples, "client": grows})["met"] is False


def test_a_side_that_cannot_be_had_says_why():
    with pytest.raises(SideFailed, match="make bench-setup"):
        Side("tensorflow", SHAPE, environment="nowhere")
    with Side("nobody", SHAPE) as side, pytest.raises(SideFailed, match="No module named"):
        side.ready(timeout_s=60.0)
