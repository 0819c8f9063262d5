"""The profile's timers and sums add up; nothing is measured here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import profile, profile_picture
from benchmarks.profile_timers import REST, Timers
from benchmarks.side import Answer

LOSS = {"decode": 1.0, "kernel": 20.0, "fan-out": 2.0, "merge": 0.5, REST: 0.5}
COMMIT = {"kernel": 10.0, "fan-out": 1.0, REST: 1.0}


def told(count: int) -> Answer:
    extra = {"loss_ms": 31.0, "loss_rpc_ms": 30.0, "backward_ms": 2.0, "commit_ms": 16.0, "commit_rpc_ms": 15.0}
    return Answer([50.0] * count, {name: [value] * count for name, value in extra.items()})


def test_the_parts_of_a_step_are_what_trainer_and_front_end_say_of_it():
    step = profile.steps_of(told(1), {"loss": [LOSS], "commit": [COMMIT]})[0]
    assert step["loss: wire"] == pytest.approx(30.0 - 24.0)
    assert step["commit: wire"] == pytest.approx(15.0 - 12.0)
    assert sum(value for name, value in step.items() if name != "step") == pytest.approx(31.0 + 2.0 + 16.0)


def test_figures_of_different_steps_are_not_joined():
    with pytest.raises(ValueError, match="2 steps"):
        profile.steps_of(told(2), {"loss": [LOSS, LOSS], "commit": [COMMIT]})


def test_a_timer_leaves_out_what_a_timer_inside_it_counts():
    timers = Timers()
    inner = timers._timed(lambda: time.sleep(0.02), "inner")
    outer = timers._timed(lambda: (time.sleep(0.005), inner()), "outer")
    inner()  # outside a counted call, so it is not counted
    began = time.perf_counter()
    timers._counted(outer, "loss")()
    took = 1e3 * (time.perf_counter() - began)
    parts = timers.take()["loss"][0]
    assert parts["inner"] >= 20.0
    assert parts["outer"] + parts[REST] + parts["inner"] == pytest.approx(took, abs=1.0)
    assert timers.take() == {"loss": [], "commit": []}


def test_a_picture_is_drawn_of_every_layer(tmp_path: Path):
    step = profile.steps_of(told(1), {"loss": [LOSS], "commit": [COMMIT]})[0]
    step_ms = step.pop("step")
    found = profile.Profile("tiny", {"N": 7, "D": 5, "V": 11, "K": 2}, 1, step_ms, step, 9.0, 0.1)
    assert found.unaccounted_ms == pytest.approx(1.0)
    layers = profile_picture.layers_of(found)
    assert sum(layers.values()) == pytest.approx(step_ms)
    assert (layers["kernel, score"], layers["kernel, apply"], layers["fan-out"]) == (20.0, 10.0, 3.0)
    profile_picture.draw([found, found], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
