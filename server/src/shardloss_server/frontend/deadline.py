"""The one deadline of a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardloss.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock, seconds."""

    at: float

    @staticmethod
    def after(seconds: float) -> Deadline:
        """The moment `seconds` from now."""
        return Deadline(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    def check(self, what: str) -> None:
        """Go on only while there is time.

        Raises:
            DeadlineExceeded: there is none.
        """
        if self.left() == 0:
            raise DeadlineExceeded(f"the deadline passed before {what}")

    @contextmanager
    def holding(self, lock: threading.Lock, what: str) -> Iterator[None]:
        """Hold a lock, waiting for it no longer than this deadline.

        Raises:
            DeadlineExceeded: it was not free in time.
        """
        if not lock.acquire(timeout=self.left()):
            raise DeadlineExceeded(f"the deadline passed while waiting for {what}; repeat with the same key")
        try:
            yield
        finally:
            lock.release()
