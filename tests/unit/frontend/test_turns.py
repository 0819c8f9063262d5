"""Turns at the workers: the time for which callers were served decides who is next. The test controls the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from shardloss.errors import DeadlineExceeded, Overloaded
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.turns import STALLED_S, Turns

from ...patience import PATIENCE_S, eventually

TURN_S = 0.01


class Clock:
    """A clock that advances only if the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Line:
    """Calls in separate threads that each request a turn, and the order in which they got one."""

    def __init__(self, max_at_once: int = 1) -> None:
        self.clock = Clock()
        self.turns = Turns(max_at_once, self.clock)
        self.order: list[str] = []
        self._ends: dict[str, list[threading.Event]] = {}
        self._threads: list[threading.Thread] = []

    def ask(self, caller: str, *, goes_first: bool = False) -> None:
        """Start one more call, and return when it is in the line or at the workers."""
        end = threading.Event()
        self._ends.setdefault(caller, []).append(end)

        def call() -> None:
            with self.turns.turn(Deadline.after(PATIENCE_S, caller), goes_first=goes_first):
                self.order.append(caller)
                end.wait(PATIENCE_S)

        before, num = self.turns.num_waiting + self.turns.num_held, len(self.order)
        thread = threading.Thread(target=call)
        thread.start()
        self._threads.append(thread)
        eventually(lambda: self.turns.num_waiting + self.turns.num_held > before, "the call in the line")
        eventually(lambda: len(self.order) > num or self.turns.num_waiting > 0, "the call at the workers")

    def serve(self, seconds: float = TURN_S) -> None:
        """End the last granted turn after the given number of seconds."""
        num, is_last = len(self.order), self.turns.num_waiting == 0
        self.clock.now += seconds
        self._ends[self.order[-1]].pop(0).set()
        eventually(lambda: self.turns.num_held == 0 if is_last else len(self.order) > num, "the next turn")

    def end_of(self, caller: str) -> None:
        """End a caller's oldest turn."""
        held = self.turns.num_held + self.turns.num_waiting
        self.clock.now += TURN_S
        self._ends[caller].pop(0).set()
        eventually(lambda: self.turns.num_held + self.turns.num_waiting < held, "the end of a turn")

    def serve_all(self) -> list[str]:
        """Serve every call for TURN_S, and return the callers in the order of their turns."""
        while self.turns.num_held:
            self.serve()
        return self.order

    def end(self) -> None:
        for ends in self._ends.values():
            for end in ends:
                end.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)


@contextmanager
def line(max_at_once: int = 1) -> Iterator[Line]:
    made = Line(max_at_once)
    try:
        yield made
    finally:
        made.end()


def test_a_light_caller_waits_for_one_turn_not_for_the_line() -> None:
    """While six calls of a heavy caller wait, a call of a light caller is next."""
    with line() as made:
        for _ in range(7):
            made.ask("heavy")
        made.ask("light")
        assert made.serve_all()[:3] == ["heavy", "light", "heavy"]


def test_callers_that_always_wait_take_turns() -> None:
    """The caller with the most calls in the line is served no more often than the others."""
    with line() as made:
        for caller, count in (("a", 9), ("b", 3), ("c", 3)):
            for _ in range(count):
                made.ask(caller)
        order = made.serve_all()
        assert sorted(order[:10]).count("b") == sorted(order[:10]).count("c") == 3


def test_what_counts_is_time_not_calls() -> None:
    """A caller whose turns take five times as long gets a fifth of the turns."""
    with line() as made:
        for _ in range(12):
            made.ask("long")
            made.ask("short")
        while made.turns.num_waiting > 8:
            made.serve(5 * TURN_S if made.order[-1] == "long" else TURN_S)
        assert made.order.count("short") >= 2 * made.order.count("long")


def test_a_pause_saves_up_no_time() -> None:
    """A caller that returns is next, but then takes turns like the others, however much they were served before."""
    with line() as made:
        for _ in range(30):
            made.ask("there")
        for _ in range(15):
            made.serve()
        for _ in range(12):
            made.ask("back")
        order = made.serve_all()[16:]
        assert order[0] == "back"
        assert order[:20].count("there") >= 6


def test_a_lock_holder_that_others_wait_for_is_next() -> None:
    with line() as made:
        for _ in range(3):
            made.ask("a")
        made.ask("b", goes_first=True)
        made.serve()
        assert made.order == ["a", "b"]


def test_a_turn_that_hangs_does_not_hold_up_the_others() -> None:
    """A turn held for longer than STALLED_S no longer counts."""
    with line() as made:
        made.ask("hanging")
        made.ask("next")
        assert made.order == ["hanging"]
        made.clock.now += STALLED_S
        eventually(lambda: made.order == ["hanging", "next"], "the next turn")
        assert made.turns.num_held == 2


def test_a_call_that_cannot_be_in_time_is_refused_at_once() -> None:
    """The retry hint is the time that the line takes, and grows with the line."""
    hints = []
    with line() as made:
        made.ask("a")
        for _ in range(3):
            made.ask("a")
            with pytest.raises(Overloaded) as refused, made.turns.turn(Deadline.after(0.001, "a")):
                pass
            hints.append(refused.value.retry_after_s)
        assert made.turns.num_refused == 3
    assert 0 < hints[0] < hints[1] < hints[2]


def test_who_goes_away_leaves_the_line() -> None:
    """The call of a caller that disconnects ends, and it neither waits nor holds a turn."""
    with line() as made:
        made.ask("a")
        deadline = Deadline.after(PATIENCE_S, "b")
        gone = threading.Timer(0.02, deadline.cancel)
        gone.start()
        with pytest.raises(DeadlineExceeded), made.turns.turn(deadline):
            pass
        gone.join()
        assert made.turns.num_waiting == 0
    assert made.turns.num_held == 0


def test_there_are_few_at_the_workers_only_beside_a_light_caller() -> None:
    """Callers of equal demand may fill the workers; once a less-served caller arrives, others wait."""
    with line(max_at_once=3) as made:
        for caller in "abc":
            made.ask(caller)
        assert made.turns.num_held == 3
        made.ask("a")
        made.ask("light")
        assert made.turns.num_held == 3
        for caller in "abc"[:2]:
            made.end_of(caller)
        eventually(lambda: made.order == ["a", "b", "c", "light"], "the light caller's turn")
        assert (made.turns.num_held, made.turns.num_waiting) == (2, 1)
