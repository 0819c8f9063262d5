"""The progress of a table's creation, which the server fills for minutes if the table is large."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from shardloss.errors import ShardlossError
from shardloss.types import TableInfo

POLL_S = 0.5
Progress = Callable[[int, int], object]  # (rows done, rows in all)


@contextmanager
def reported(progress: Progress | None, state: Callable[[], TableInfo]) -> Iterator[None]:
    """Pass the number of filled rows to progress every POLL_S, in a thread, while the table is being created."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def report() -> None:
        while not over.wait(POLL_S):
            with suppress(ShardlossError):  # not known yet, or the server is busy: the creation itself reports errors
                seen = state()
                progress(int(seen.filled * seen.num_classes), seen.num_classes)

    thread = threading.Thread(target=report, name="creation-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
