"""The deadline of a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardloss.errors import DeadlineExceeded

from shardloss_server.frontend.meter import meter

CALLER_CHECK_S = 0.5  # a wait notices within this time that its caller has gone away


class Deadline:
    """A deadline on the monotonic clock, in seconds; it passes at once when the caller goes away.

    caller is the waiting caller, as `rpc/caller.py` names it, or "" for the server itself.
    """

    def __init__(self, at: float, caller: str = "") -> None:
        self._at, self.caller = at, caller

    @staticmethod
    def after(seconds: float, caller: str = "") -> Deadline:
        """Return the deadline that is `seconds` from now."""
        return Deadline(time.monotonic() + seconds, caller)

    def cancel(self) -> None:
        """Let the deadline pass now, because the caller no longer waits."""
        self._at = 0.0

    def left(self) -> float:
        """Return the seconds left, never negative."""
        return max(0.0, self._at - time.monotonic())

    def check(self, what: str) -> None:
        """Raise an error if the deadline has passed.

        Raises:
            DeadlineExceeded: no time is left; the message is "the deadline passed before {what}".
        """
        if self.left() == 0:
            raise DeadlineExceeded(f"the deadline passed before {what}")

    def wait(self, ready: Callable[[float], bool], what: str) -> None:
        """Wait until ready(seconds) returns True, checking every CALLER_CHECK_S that the caller is still there.

        Raises:
            DeadlineExceeded: ready did not return True in time.
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
        """Hold a lock, waiting for it no longer than this deadline allows.

        Raises:
            DeadlineExceeded: the lock was not free in time.
        """
        self.wait(lambda seconds: lock.acquire(timeout=seconds), f"{what} finished; repeat with the same key")
        try:
            yield
        finally:
            lock.release()
