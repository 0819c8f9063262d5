"""Admission: how many calls, request bytes and streams may be inside the server at once, and whose."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardloss.errors import Overloaded

from shardloss_server.frontend.hints import Hints

LEAST_PATIENCE = 0.1  # of idle_s, for streams that stand still where no place is free


class Admission:
    """Counts calls in flight and the bytes they brought; refuses at once rather than queueing. Thread-safe.

    A caller may hold as many places, and as many bytes, as are left free beside its own: alone half of them, and
    somebody else always finds some.

    limit is the setting that max_calls comes from.
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
        """Hold one call's place.

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
    """Whether who holds num_own places may take one of num_free."""
    return 0 < num_free >= num_own


class LiveStreams:
    """Streaming calls from their first byte to their last: a bounded number, none of which may stand still.

    A stream that waits for its client, to send or to read, for longer than idle_s is dropped: sooner where few places
    are free. A caller may hold as many places as are left free. Thread-safe.
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
        """Streams under way."""
        return len(self._waiting_since)

    @contextmanager
    def stream(self, drop: Callable[[], object], caller: str = "") -> Iterator[LiveStream]:
        """Hold one stream's place; `drop` ends the stream from another thread.

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
        """End every stream that has not moved for too long; the number ended."""
        with self._lock:
            free = 1 - self.num_streams / self._max_streams
            patience_s = self._idle_s * min(1.0, LEAST_PATIENCE + free)
            silent = [drop for drop, since in self._waiting_since.items() if now - since > patience_s]
            self.num_dropped += len(silent)
        for drop in silent:
            drop()
        return len(silent)


class LiveStream:
    """One streaming call, as `LiveStreams` watches it; once its place is given back, nothing is noted any more."""

    def __init__(
        self, waiting_since: dict[Callable[[], object], float], drop: Callable[[], object], lock: threading.Lock
    ) -> None:
        self._waiting_since, self._drop, self._lock = waiting_since, drop, lock

    def moved(self) -> None:
        """The client has sent or read a piece; from now on its next one is waited for."""
        self._note(time.monotonic())

    def working(self) -> None:
        """The server is at work: nothing is waited for from the client."""
        self._note(float("inf"))

    def _note(self, since: float) -> None:
        with self._lock:
            if self._drop in self._waiting_since:
                self._waiting_since[self._drop] = since


class Unsent:
    """Replies of unary calls from their handler to the wire: bounded in bytes, and dropped where nobody reads them.

    The place of a call is free again once its handler has ended, but its reply is held until the client has taken it.
    What a call has done is never hidden: new calls are refused where too much is unread, and who leaves as much unread
    as is left free is refused first. So calls in flight may go above max_bytes with their replies. Thread-safe.
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
        """See that there is room for a reply to this caller.

        Raises:
            Overloaded: clients do not read as many bytes as may wait, or this one leaves its share unread.
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
        """Count a reply until its call has ended; drop ends it, at_end(f) has f called then, or is False if it had."""
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
        """End every call whose reply was not read in time; the number ended."""
        with self._lock:
            silent = [drop for drop, (since, *_) in self._since.items() if now - since > self._longest_s]
            self.num_dropped += len(silent)
        for drop in silent:
            drop()
        return len(silent)
