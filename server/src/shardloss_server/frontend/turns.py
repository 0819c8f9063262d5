"""Turns at the workers: several calls run there at once, and the others wait; the least served caller is next.

A turn is held for one fan-out, and never while a call waits for its client or for another call's step. A caller's
service is counted in seconds of turns. A caller that returns after a pause begins where the last turn began, and may
take a step's turns before it counts as ahead: it neither saves up time nor waits behind callers that are always busy
(start-time fair queueing).

Calls that are already at the workers cannot be overtaken, but the workers are used best with many calls there. So many
turns are granted while all callers request equal amounts; if one requests less than its share, only a few are granted,
so that its calls are answered soon.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shardloss.errors import Overloaded

from shardloss_server.frontend.deadline import Deadline

STALLED_S = 1.0  # a turn held for longer no longer counts: a worker that hangs must not hold up the others
FEW_AT_ONCE, LIGHT_S = 2, 5.0  # turns at once, for LIGHT_S after the request of a light caller
LIGHT_TURNS = 2  # a light caller is ahead by at most this; others always wait, so they are ahead by STEP_TURNS
MOST_KNOWN = 1024  # callers remembered; above that, those that were served least are forgotten
FIRST_COST_S, NEW_SHARE = 0.005, 0.1  # assumed for a turn before any has ended; weight of the last turn in the mean
STEP_TURNS = 4  # turns of mean length that a caller may be ahead: a loss and its commit, which may score again


@dataclass(slots=True, eq=False)
class Turn:
    """A turn of one call at the workers, from its request to its end."""

    caller: str
    goes_first: bool
    began: float = 0.0  # s, set when granted
    expected_s: float = 0.0
    granted: threading.Event = field(default_factory=threading.Event)


class Turns:
    """The turns at the workers, at most max_at_once at a time. Thread-safe; clock is in seconds."""

    def __init__(self, max_at_once: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_at_once, self._clock = max_at_once, clock
        self._lock = threading.Lock()
        self._held: set[Turn] = set()
        self._urgent: deque[Turn] = deque()
        self._waiting: dict[str, deque[Turn]] = {}
        self._served: dict[str, float] = {}
        self._light_at = float("-inf")  # time of the last request of a light caller
        self._now_served = 0.0  # where the last turn began: no caller's next turn begins before it
        self.mean_s = FIRST_COST_S
        self.num_refused = 0

    @property
    def num_held(self) -> int:
        """Number of calls at the workers."""
        return len(self._held)

    @property
    def num_waiting(self) -> int:
        """Number of calls that wait for their turn."""
        with self._lock:
            return len(self._urgent) + sum(map(len, self._waiting.values()))

    @contextmanager
    def turn(self, deadline: Deadline, *, goes_first: bool = False) -> Iterator[None]:
        """Wait for a turn for the deadline's caller and hold it; goes_first is for a call that holds up others.

        Raises:
            Overloaded: the turn would come after the deadline; `retry_after_s` is how long it would take.
            DeadlineExceeded: the turn did not come in time, or the caller went away.
        """
        turn = self._ask(deadline, goes_first)
        try:
            if not turn.granted.is_set():
                deadline.wait(lambda seconds: self._came(turn, seconds), "the call had its turn at the workers")
            yield
        finally:
            self._end(turn)

    def _ask(self, deadline: Deadline, goes_first: bool) -> Turn:
        turn = Turn(deadline.caller, goes_first)
        with self._lock:
            if not goes_first:
                self._refuse_late(turn.caller, deadline)
            self._note_light(turn.caller)
            self._line_of(turn).append(turn)
            self._grant()
        return turn

    def _note_light(self, caller: str) -> None:
        if self._waiting and self._served.get(caller, 0.0) <= self._now_served + LIGHT_TURNS * self.mean_s:
            self._light_at = self._clock()

    def _line_of(self, turn: Turn) -> deque[Turn]:
        return self._urgent if turn.goes_first else self._waiting.setdefault(turn.caller, deque())

    def _refuse_late(self, caller: str, deadline: Deadline) -> None:
        """Refuse a call whose turn would come after its deadline.

        Every other caller gets as many turns before it as its own caller has waiting, this call included.
        """
        own = len(self._waiting.get(caller, ())) + 1
        ahead = len(self._urgent) + sum(min(len(turns), own) for turns in self._waiting.values())
        wait_s = ahead * self.mean_s / self._max_at_once
        if ahead and wait_s > deadline.left():
            self.num_refused += 1
            ahead_of_it = f"{ahead} calls are ahead of this one, {wait_s:.2f} s of work: it would miss its deadline"
            raise Overloaded(ahead_of_it, retry_after_s=wait_s, limit="max_calls_at_workers")

    def _came(self, turn: Turn, seconds: float) -> bool:
        if turn.granted.wait(seconds):
            return True
        with self._lock:
            self._grant()  # a turn may have stalled during the wait
        return turn.granted.is_set()

    def _grant(self) -> None:
        """Grant the free turns to waiting calls."""
        while self._urgent or self._waiting:
            now = self._clock()
            most = min(self._max_at_once, FEW_AT_ONCE) if now - self._light_at < LIGHT_S else self._max_at_once
            if sum(now - turn.began < STALLED_S for turn in self._held) >= most:
                return
            turn = self._urgent.popleft() if self._urgent else self._next()
            turn.began, turn.expected_s = now, self.mean_s
            served_s = max(self._served.get(turn.caller, 0.0), self._now_served)
            self._served[turn.caller] = served_s + self.mean_s
            self._held.add(turn)
            turn.granted.set()

    def _next(self) -> Turn:
        caller = min(self._waiting, key=lambda caller: (self._share(caller), self._served.get(caller, 0.0)))
        turns = self._waiting[caller]
        self._now_served = self._share(caller)
        turn = turns.popleft()
        if not turns:
            del self._waiting[caller]
        return turn

    def _share(self, caller: str) -> float:
        """Return the served seconds at which the caller's next turn begins."""
        return max(self._served.get(caller, 0.0) - STEP_TURNS * self.mean_s, self._now_served)

    def _end(self, turn: Turn) -> None:
        with self._lock:
            if turn in self._held:
                self._held.discard(turn)
                took_s = self._clock() - turn.began
                served_s = self._served.get(turn.caller, self._now_served)
                self._served[turn.caller] = served_s + took_s - turn.expected_s
                self.mean_s += NEW_SHARE * (min(took_s, STALLED_S) - self.mean_s)
            else:
                self._give_up(turn)
            self._forget()
            self._grant()

    def _give_up(self, turn: Turn) -> None:
        turns = self._line_of(turn)
        turns.remove(turn)
        if not turns and not turn.goes_first:
            del self._waiting[turn.caller]

    def _forget(self) -> None:
        """Reset all counts if no call holds a turn or waits for one.

        Otherwise, above MOST_KNOWN callers, forget those that would begin where the last turn began anyway.
        """
        if not self._held and not self._waiting and not self._urgent:
            self._served.clear()
            self._now_served = 0.0
        elif len(self._served) > MOST_KNOWN:
            self._served = {caller: s for caller, s in self._served.items() if s > self._now_served}
