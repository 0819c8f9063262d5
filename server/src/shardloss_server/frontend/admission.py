"""Admission: how many calls and request bytes may be inside the server at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shardloss.errors import Overloaded

RETRY_AFTER_S = 0.1


class Admission:
    """Counts calls in flight and the bytes they brought; refuses at once rather than queueing. Thread-safe."""

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._lock = threading.Lock()
        self.num_calls = 0
        self.num_bytes = 0

    @contextmanager
    def admit(self, num_bytes: int) -> Iterator[None]:
        """Hold one call's place.

        Raises:
            Overloaded: no place is free; `retry_after_s` says when to repeat.
        """
        with self._lock:
            full = self.num_calls >= self._max_calls
            if full or (self.num_calls and self.num_bytes + num_bytes > self._max_bytes):
                what = f"{self.num_calls} calls with {self.num_bytes} bytes are in flight"
                raise Overloaded(f"{what}; repeat shortly", retry_after_s=RETRY_AFTER_S)
            self.num_calls += 1
            self.num_bytes += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self.num_calls -= 1
                self.num_bytes -= num_bytes
