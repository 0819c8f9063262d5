"""Retry hints for refused calls, spaced at the rate at which places become free, so that they do not coincide."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

LEAST_S, MOST_S = 0.05, 5.0
FIRST_INTERVAL_S, NEW_SHARE = 0.01, 0.1  # between two freed places, before any is; weight of the last one in the mean


class Hints:
    """Retry delays for refused calls: position in a virtual queue divided by its drain rate. Thread-safe.

    spread(low, high) returns a random factor, so that clients with equal delays do not return together.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock, self._spread = clock, spread
        self._lock = threading.Lock()
        self._last = 0.0  # time of the last position in the queue
        self._interval_s = FIRST_INTERVAL_S

    def ended(self, held_s: float, num_calls: int) -> None:
        """Note that a place is free again after held_s seconds, while num_calls places were held."""
        with self._lock:
            self._interval_s += NEW_SHARE * (held_s / max(1, num_calls) - self._interval_s)

    def next(self) -> float:
        """Return the retry delay of one more refused call, in seconds.

        The delay grows with the queue up to MOST_S; once the queue is full, it is between half of MOST_S and MOST_S.
        """
        with self._lock:
            now = self._clock()
            self._last = min(max(self._last, now) + self._interval_s, now + MOST_S)
            wait_s = self._last - now
        if wait_s >= MOST_S:
            return MOST_S * self._spread(0.5, 1.0)
        return min(MOST_S, max(LEAST_S, wait_s) * self._spread(0.75, 1.25))
