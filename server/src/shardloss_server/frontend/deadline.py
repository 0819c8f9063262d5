"""The one deadline of a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardloss.errors import DeadlineExceeded

from shardloss_server.frontend.meter import meter

CALLER_CHECK_S = 0.5  # how soon a wait sees that its caller has gone away


class Deadline:
    """A moment on the monotonic clock, seconds; or the present one, once the caller has gone away.

    caller is who waits, as `rpc/caller.py` names it; "" is the server itself.
    """

    def __init__(self, at: float, caller: str = "") -> None:
        self._at, self.caller = at, caller

    @staticmethod
    def after(seconds: float, caller: str = "") -> Deadline:
        """The moment `seconds` from now."""
        return Deadline(time.monotonic() + seconds, caller)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._at = 0.0

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - time.monotonic())

    def check(self, what: str) -> None:
        """Go on only while there is time.

        Raises:
            DeadlineExceeded: there is none.
        """
        if self.left() == 0:
            raise DeadlineExceeded(f"the deadline passed before {what}")

    def wait(self, ready: Callable[[float], bool], what: str) -> None:
        """Wait until ready(seconds) says so, looking up now and then whether the caller is still there.

        Raises:
            DeadlineExceeded: it did not, in time.
        """
        began = time.perf_counter()
        try:
            while not ready(min(self.left(), CALLER_CHECK_S)):
                self.check(what)
        finally:
            spent, ended = meter(), time.perf_counter()
            spent.wait_s += ended - began
            spent.note("wait", began, ended)

    @contextmanager
    def holding(self, lock: threading.Lock, what: str) -> Iterator[None]:
        """Hold a lock, waiting for it no longer than this deadline.

        Raises:
            DeadlineExceeded: it was not free in time.
        """
        self.wait(lambda seconds: lock.acquire(timeout=seconds), f"{what} was over; repeat with the same key")
        try:
            yield
        finally:
            lock.release()
