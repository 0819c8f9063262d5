"""Admission: how many calls, request bytes and half-received streams may be inside the server at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
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


class Receiving:
    """Streams whose request is still on its way: a bounded number, each dropped when it falls silent. Thread-safe."""

    def __init__(self, max_streams: int, idle_s: float) -> None:
        self._max_streams, self._idle_s = max_streams, idle_s
        self._lock = threading.Lock()
        self._last_heard: dict[Callable[[], object], float] = {}

    @contextmanager
    def stream(self, drop: Callable[[], object]) -> Iterator[Callable[[], None]]:
        """Hold one stream's place and yield what to call for each piece; `drop` ends the stream from another thread.

        Raises:
            Overloaded: no place is free.
        """
        with self._lock:
            if len(self._last_heard) >= self._max_streams:
                raise Overloaded(f"{self._max_streams} streams are being received", retry_after_s=RETRY_AFTER_S)
            self._last_heard[drop] = time.monotonic()

        def heard() -> None:
            self._last_heard[drop] = time.monotonic()

        try:
            yield heard
        finally:
            with self._lock:
                self._last_heard.pop(drop, None)

    def drop_silent(self, now: float) -> int:
        """End every stream that has said nothing for idle_s; the number ended."""
        with self._lock:
            silent = [drop for drop, heard in self._last_heard.items() if now - heard > self._idle_s]
        for drop in silent:
            drop()
        return len(silent)
