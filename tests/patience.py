"""Waiting for what another thread or process does: by polling, with a deadline far above what a busy machine needs."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 120.0


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Poll until a condition is true; fail after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.001)
