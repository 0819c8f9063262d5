"""Admission and retry hints: no caller can occupy every place, and refused calls return one after another."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from shardloss.errors import Overloaded
from shardloss_server.frontend.admission import Admission, LiveStreams, Unsent
from shardloss_server.frontend.hints import LEAST_S, MOST_S, Hints


def take(places: Admission, stack: ExitStack, caller: str, num_bytes: int = 1) -> int:
    """Return the number of places that a caller gets before it is refused."""
    for count in range(100):
        try:
            stack.enter_context(places.admit(num_bytes, caller))
        except Overloaded:
            return count
    raise AssertionError("nothing was refused")


def test_a_caller_leaves_as_many_places_as_it_holds() -> None:
    """Each caller gets just over half of the places that are left (8, 4 and 2 of 15), and all are freed at the end."""
    places = Admission(15, 1000, "max")
    with ExitStack() as stack:
        assert [take(places, stack, caller) for caller in "abc"] == [8, 4, 2]
        assert places.num_refused == 3
        assert places.num_calls == 14
    assert (places.num_calls, places.num_bytes) == (0, 0)


def test_bytes_are_shared_as_places_are() -> None:
    places = Admission(100, 1000, "max")
    with ExitStack() as stack:
        assert [take(places, stack, caller, 100) for caller in "ab"] == [5, 3]
        assert places.num_bytes == 800


def test_the_last_byte_may_be_taken() -> None:
    places = Admission(4, 10, "max")
    with places.admit(6, "a"), places.admit(4, "b"):
        assert places.num_bytes == 10


def test_one_call_may_be_larger_than_all_bytes() -> None:
    """If no other call is admitted, a call may exceed the total; the size of a single call has its own limit."""
    places = Admission(4, 10, "max")
    with places.admit(50, "a"):
        assert places.num_bytes == 50


def test_hints_stand_in_a_line() -> None:
    """Each refused call is told to return after the one before it, as fast as places become free, up to MOST_S."""
    now = 50.0
    hints = Hints(lambda: now, lambda _low, _high: 1.0)
    for _ in range(200):
        hints.ended(held_s=1.0, num_calls=10)
    line = [hints.next() for _ in range(60)]
    assert line == sorted(line)
    assert line[9] == pytest.approx(1.0, rel=0.01)
    assert line[-1] <= MOST_S
    now += 1000
    assert LEAST_S <= hints.next() < line[5]


def test_equal_hints_are_spread() -> None:
    """Hints are spread even if the queue is so long that they reach their upper limit."""
    hints = Hints(lambda: 0.0)
    given = [hints.next() for _ in range(2000)]
    assert len(set(given[-100:])) == 100
    assert all(LEAST_S / 2 < hint <= MOST_S for hint in given)


@pytest.mark.parametrize("num_streams, after_s", [(1, 8.5), (4, 1.0)])
def test_a_silent_stream_is_dropped_sooner_where_places_are_few(num_streams: int, after_s: float) -> None:
    """A stream may be silent for nearly all of idle_s if most places are free, and for a tenth of it if none is."""
    streams, dropped = LiveStreams(4, 10.0, "max"), []
    with ExitStack() as stack:
        for number in range(num_streams):
            stack.enter_context(streams.stream(lambda number=number: dropped.append(number), f"{number}"))
        now = time.monotonic()
        assert streams.drop_silent(now + 0.9 * after_s) == 0
        assert streams.drop_silent(now + 1.1 * after_s) == num_streams == len(dropped)
    assert streams.num_streams == 0


def test_unread_replies_are_bounded() -> None:
    """Unread bytes are freed as calls end, calls that have already ended do not count, and no caller can use all bytes.

    Only new calls are refused: a reply that has been computed is always handed over.
    """
    unsent, ends = Unsent(100, 1.0), []

    def at_end(end: object) -> bool:
        ends.append(end)
        return True

    unsent.hand_over(60, lambda: "a", at_end, "deaf")
    with pytest.raises(Overloaded) as refused:
        unsent.refuse_unread("deaf")
    assert refused.value.retry_after_s > 0
    unsent.refuse_unread("another")
    unsent.hand_over(50, lambda: "b", at_end, "another")
    with pytest.raises(Overloaded):
        unsent.refuse_unread("a third")
    for end in ends:
        end()
    unsent.refuse_unread("deaf")
    unsent.hand_over(50, lambda: "c", lambda _end: False)
    assert unsent.num_bytes == 0
