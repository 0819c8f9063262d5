"""Admission: limits on calls, request bytes and streams that the server handles at once, in total and per caller."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardloss.errors import Overloaded

from shardloss_server.frontend.hints import Hints

LEAST_PATIENCE = 0.1  # share of idle_s that an idle stream gets while no place is free


class Admission:
    """A limit on calls in flight and on their request bytes; it refuses at once and does not queue. Thread-safe.

    A caller may hold only as many places, and as many bytes, as remain free. So a single caller gets at most half of
    them, and some always remain for other callers.

    limit is the name of the setting that defines max_calls.
    """

    def __init__(self, max_calls: int, max_bytes: int, limit: str) -> None:
        self.max_calls, self.max_bytes, self.limit = max_calls, max_bytes, limit
        self._lock = threading.Lock()
        self._hints = Hints()
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.num_calls = 0
        self.num_bytes = 0
        self.num_refused = 0

    @contextmanager
    def admit(self, num_bytes: int, caller: str = "") -> Iterator[None]:
        """Hold a place for one call.

        Raises:
            Overloaded: no place is free for this caller; `retry_after_s` says when to repeat.
        """
        began = time.monotonic()
        with self._lock:
            if not self._has_place(num_bytes, caller):
                self.num_refused += 1
                what, free = f"{self.num_calls} calls with {self.num_bytes} bytes are in flight", self._num_free
                limit = "max_message_bytes" if has_share(self._calls[caller], free) else self.limit
                raise Overloaded(f"{what}; repeat later", retry_after_s=self._hints.next(), limit=limit)
            self._count(caller, 1, num_bytes)
        try:
            yield
        finally:
            self._hints.ended(time.monotonic() - began, self.num_calls)
            with self._lock:
                self._count(caller, -1, -num_bytes)

    def _has_place(self, num_bytes: int, caller: str) -> bool:
        free_bytes = self.max_bytes - self.num_bytes - num_bytes
        if self.num_calls and (free_bytes < 0 or self._bytes[caller] > free_bytes):
            return False
        return has_share(self._calls[caller], self._num_free)

    @property
    def _num_free(self) -> int:
        return self.max_calls - self.num_calls

    def _count(self, caller: str, num_calls: int, num_bytes: int) -> None:
        self.num_calls += num_calls
        self.num_bytes += num_bytes
        self._calls[caller] += num_calls
        self._bytes[caller] += num_bytes
        if not self._calls[caller]:
            del self._calls[caller], self._bytes[caller]


def has_share(num_own: int, num_free: int) -> bool:
    """Return True if a caller that holds num_own places may take one of num_free."""
    return 0 < num_free >= num_own


class LiveStreams:
    """The streaming calls under way: their number is limited, and idle ones are dropped. Thread-safe.

    A stream is dropped when it has waited longer than idle_s for its client to send or to read, and sooner if few
    places are free. A caller may hold only as many places as remain free.
    """

    def __init__(self, max_streams: int, idle_s: float, limit: str) -> None:
        self._max_streams, self._idle_s, self._limit = max_streams, idle_s, limit
        self._lock = threading.Lock()
        self._hints = Hints()
        self._waiting_since: dict[Callable[[], object], float] = {}
        self._streams: Counter[str] = Counter()
        self.num_refused = 0
        self.num_dropped = 0

    @property
    def num_streams(self) -> int:
        """Number of streams under way."""
        return len(self._waiting_since)

    @contextmanager
    def stream(self, drop: Callable[[], object], caller: str = "") -> Iterator[LiveStream]:
        """Hold a place for one stream; `drop` ends the stream from another thread.

        Raises:
            Overloaded: no place is free for this caller.
        """
        began = time.monotonic()
        with self._lock:
            if not has_share(self._streams[caller], self._max_streams - self.num_streams):
                self.num_refused += 1
                what = f"{self.num_streams} streams are under way"
                raise Overloaded(what, retry_after_s=self._hints.next(), limit=self._limit)
            self._waiting_since[drop] = began
            self._streams[caller] += 1
        try:
            yield LiveStream(self._waiting_since, drop, self._lock)
        finally:
            self._hints.ended(time.monotonic() - began, self.num_streams)
            with self._lock:
                self._waiting_since.pop(drop, None)
                self._streams[caller] -= 1
                if not self._streams[caller]:
                    del self._streams[caller]

    def drop_silent(self, now: float) -> int:
        """End every stream that has been idle for too long, and return how many."""
        with self._lock:
            free = 1 - self.num_streams / self._max_streams
            patience_s = self._idle_s * min(1.0, LEAST_PATIENCE + free)
            silent = [drop for drop, since in self._waiting_since.items() if now - since > patience_s]
            self.num_dropped += len(silent)
        for drop in silent:
            drop()
        return len(silent)


class LiveStream:
    """A streaming call watched by `LiveStreams`; once its place is free again, its methods have no effect."""

    def __init__(
        self, waiting_since: dict[Callable[[], object], float], drop: Callable[[], object], lock: threading.Lock
    ) -> None:
        self._waiting_since, self._drop, self._lock = waiting_since, drop, lock

    def moved(self) -> None:
        """Note that the client has sent or read a piece, so the wait for the next one begins now."""
        self._note(time.monotonic())

    def working(self) -> None:
        """Note that the server is at work and does not wait for the client."""
        self._note(float("inf"))

    def _note(self, since: float) -> None:
        with self._lock:
            if self._drop in self._waiting_since:
                self._waiting_since[self._drop] = since


class Unsent:
    """Replies of unary calls that are not sent yet: limited in bytes, and dropped if the client does not read them.

    The place of a call is free again once its handler has ended, but its reply is held until the client has read it. No
    finished call is refused its reply. Instead, new calls are refused while too much is unread; a caller with more
    unread bytes than remain free is refused first. So the replies of calls in flight may exceed max_bytes. Thread-safe.
    """

    def __init__(self, max_bytes: int, longest_s: float) -> None:
        self.max_bytes, self._longest_s = max_bytes, longest_s
        self._lock = threading.Lock()
        self._hints = Hints()
        self._since: dict[Callable[[], object], tuple[float, int, str]] = {}
        self._bytes: Counter[str] = Counter()
        self.num_bytes = 0
        self.num_dropped = 0

    def refuse_unread(self, caller: str) -> None:
        """Check that there is room for a reply to this caller.

        Raises:
            Overloaded: the clients' unread replies have reached max_bytes, or this caller's exceed its share.
        """
        with self._lock:
            if not has_share(self._bytes[caller], self.max_bytes - self.num_bytes):
                unread = f"{self.num_bytes} bytes of replies are unread"
                raise Overloaded(unread, retry_after_s=self._hints.next(), limit="unread_replies")

    def hand_over(
        self,
        num_bytes: int,
        drop: Callable[[], object],
        at_end: Callable[[Callable[[], None]], bool],
        caller: str = "",
    ) -> None:
        """Count a reply until its call has ended.

        drop() ends the call. at_end(f) has f called when the call ends, or returns False if it has already ended.
        """
        with self._lock:
            self._since[drop] = time.monotonic(), num_bytes, caller
            self.num_bytes += num_bytes
            self._bytes[caller] += num_bytes
        if not at_end(lambda: self._forget(drop)):
            self._forget(drop)

    def _forget(self, drop: Callable[[], object]) -> None:
        with self._lock:
            _, num_bytes, caller = self._since.pop(drop, (0.0, 0, ""))
            self.num_bytes -= num_bytes
            self._bytes[caller] -= num_bytes
            if not self._bytes[caller]:
                del self._bytes[caller]

    def drop_silent(self, now: float) -> int:
        """End every call whose reply was not read in time, and return how many."""
        with self._lock:
            silent = [drop for drop, (since, *_) in self._since.items() if now - since > self._longest_s]
            self.num_dropped += len(silent)
        for drop in silent:
            drop()
        return len(silent)
