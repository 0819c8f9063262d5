"""When refused calls may come back: in a line, as fast as places become free, so that they do not come together."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

LEAST_S, MOST_S = 0.05, 5.0
FIRST_INTERVAL_S, NEW_SHARE = 0.01, 0.1  # between two places that become free, as long as none has; share of the last


class Hints:
    """Gives each refused call a place in a line that nobody keeps, as the seconds until it is reached. Thread-safe.

    spread(low, high) is a random factor around 1, which clients of equal hints need.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock, self._spread = clock, spread
        self._lock = threading.Lock()
        self._last = 0.0  # when the last of the line may come
        self._interval_s = FIRST_INTERVAL_S

    def ended(self, held_s: float, num_calls: int) -> None:
        """A place that was held for held_s seconds is free again; num_calls were held at once."""
        with self._lock:
            self._interval_s += NEW_SHARE * (held_s / max(1, num_calls) - self._interval_s)

    def next(self) -> float:
        """Seconds for one more refused call: grows with the line, up to MOST_S; between MOST_S and half at its end."""
        with self._lock:
            now = self._clock()
            self._last = min(max(self._last, now) + self._interval_s, now + MOST_S)
            wait_s = self._last - now
        if wait_s >= MOST_S:
            return MOST_S * self._spread(0.5, 1.0)
        return min(MOST_S, max(LEAST_S, wait_s) * self._spread(0.75, 1.25))
