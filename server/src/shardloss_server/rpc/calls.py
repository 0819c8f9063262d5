"""A small record of finished calls by method, of limited size, for GetStatus. Independent of gRPC."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from shardloss.errors import Overloaded

WINDOW_S = 60.0
KEPT = 1 << 12  # times kept per method; if a window has more calls, its quantiles cover the last KEPT


@dataclass(frozen=True, slots=True)
class MethodCalls:
    """One method's counts since the start; its rate (calls/s) and quantiles (s, 0: no call) in the last minute."""

    name: str
    num_calls: int
    errors: Mapping[str, int]
    rate: float
    median_s: float
    p90_s: float
    p99_s: float


class Method:
    """The record of the calls of one method."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.errors: Counter[str] = Counter()
        self.times: deque[tuple[float, float]] = deque(maxlen=KEPT)  # when a call ended, and how long it took
        self.by_second: deque[tuple[int, int]] = deque(maxlen=int(WINDOW_S) + 1)  # second, calls that ended in it

    def note(self, now: float, seconds: float, reason: str | None) -> None:
        """Record a call that has ended at `now`."""
        self.num_calls += 1
        if reason is not None:
            self.errors[reason] += 1
        self.times.append((now, seconds))
        second, count = self.by_second.pop() if self.by_second else (int(now), 0)
        if second != int(now):
            self.by_second.append((second, count))
            second, count = int(now), 0
        self.by_second.append((second, count + 1))

    def seen(self, name: str, now: float, age_s: float) -> MethodCalls:
        """Return the method's statistics at `now`, on a server that is age_s seconds old."""
        recent = sorted(seconds for ended, seconds in self.times if now - ended <= WINDOW_S)
        count = sum(count for second, count in self.by_second if now - second <= WINDOW_S)
        quantiles = (quantile(recent, share) for share in (0.5, 0.9, 0.99))
        rate = count / max(1.0, min(age_s, WINDOW_S))
        return MethodCalls(name, self.num_calls, dict(self.errors), rate, *quantiles)


class Calls:
    """The record of the calls of a server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._methods: dict[str, Method] = {}
        self._began = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the server was created."""
        return time.monotonic() - self._began

    def note(self, method: str, seconds: float, reason: str | None) -> None:
        """Record a call that has ended; reason is None if it succeeded."""
        with self._lock:
            known = self._methods.get(method) or self._methods.setdefault(method, Method())
            known.note(time.monotonic(), seconds, reason)

    def seen(self) -> list[MethodCalls]:
        """Return the statistics of every method that was called, sorted by name."""
        with self._lock:
            now, age_s = time.monotonic(), self.age_s
            return [method.seen(name, now, age_s) for name, method in sorted(self._methods.items())]

    @property
    def num_refused(self) -> int:
        """Calls refused as OVERLOADED since the start."""
        with self._lock:
            return sum(method.errors[Overloaded.reason] for method in self._methods.values())


def quantile(ascending: list[float], share: float) -> float:
    """Return the quantile of sorted numbers at a share in [0, 1]; 0 if there are none."""
    if not ascending:
        return 0.0
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
