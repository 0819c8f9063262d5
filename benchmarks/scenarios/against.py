"""A comparison of the service with one rival that has to be started for it and may be unavailable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.side import Side, SideFailed

# The service's own allocator settings, for processes that run parts of it without its start-up, and for their children.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def against(
    context: Context,
    scenario: str,
    rival: str,
    shape: Mapping[str, Any],
    ours: Mapping[str, Any],
    start: Callable[[], AbstractContextManager[Side]],
    **more: Any,
) -> Row:
    """Compare our trainer of a shape with the side of start(); if that is unavailable, the row has the reason."""
    try:
        with start() as theirs, context.service() as service, context.ours(service, {**shape, **ours}) as trainer:
            return context.row(scenario, rival, shape, trainer, nullcontext(theirs), **more)
    except SideFailed as error:
        return missing(scenario, rival, shape, str(error))
