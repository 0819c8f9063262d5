"""Admission: how many calls, request bytes and streams may be inside the server at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardloss.errors import Overloaded

RETRY_AFTER_S = 0.1


class Admission:
    """Counts calls in flight and the bytes they brought; refuses at once rather than queueing. Thread-safe.

    limit is the setting that max_calls comes from.
    """

    def __init__(self, max_calls: int, max_bytes: int, limit: str) -> None:
        self.max_calls, self.max_bytes, self.limit = max_calls, max_bytes, limit
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
            full = self.num_calls >= self.max_calls
            if full or (self.num_calls and self.num_bytes + num_bytes > self.max_bytes):
                what = f"{self.num_calls} calls with {self.num_bytes} bytes are in flight"
                limit = self.limit if full else "max_message_bytes"
                raise Overloaded(f"{what}; repeat shortly", retry_after_s=RETRY_AFTER_S, limit=limit)
            self.num_calls += 1
            self.num_bytes += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self.num_calls -= 1
                self.num_bytes -= num_bytes


class LiveStreams:
    """Streaming calls from their first byte to their last: a bounded number, none of which may stand still.

    A stream that waits for its client, to send or to read, for longer than idle_s is dropped. Thread-safe.
    """

    def __init__(self, max_streams: int, idle_s: float) -> None:
        self._max_streams, self._idle_s = max_streams, idle_s
        self._lock = threading.Lock()
        self._waiting_since: dict[Callable[[], object], float] = {}

    @property
    def num_streams(self) -> int:
        """Streams under way."""
        return len(self._waiting_since)

    @contextmanager
    def stream(self, drop: Callable[[], object]) -> Iterator[LiveStream]:
        """Hold one stream's place; `drop` ends the stream from another thread.

        Raises:
            Overloaded: no place is free.
        """
        with self._lock:
            if len(self._waiting_since) >= self._max_streams:
                what = f"{self._max_streams} streams are under way"
                raise Overloaded(what, retry_after_s=RETRY_AFTER_S, limit="max_streams")
            self._waiting_since[drop] = time.monotonic()
        try:
            yield LiveStream(self._waiting_since, drop)
        finally:
            with self._lock:
                self._waiting_since.pop(drop, None)

    def drop_silent(self, now: float) -> int:
        """End every stream that has not moved for idle_s; the number ended."""
        with self._lock:
            silent = [drop for drop, since in self._waiting_since.items() if now - since > self._idle_s]
        for drop in silent:
            drop()
        return len(silent)


class LiveStream:
    """One streaming call, as `LiveStreams` watches it."""

    def __init__(self, waiting_since: dict[Callable[[], object], float], drop: Callable[[], object]) -> None:
        self._waiting_since, self._drop = waiting_since, drop

    def moved(self) -> None:
        """The client has sent or read a piece; from now on its next one is waited for."""
        self._waiting_since[self._drop] = time.monotonic()

    def working(self) -> None:
        """The server is at work: nothing is waited for from the client."""
        self._waiting_since[self._drop] = float("inf")
