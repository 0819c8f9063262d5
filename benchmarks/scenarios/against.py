"""The service against one rival that has to be started for it, and may not be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.side import Side, SideFailed

# What the service sets at its start, for processes that hold its parts in another house, and for all that they start.
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
    """The row of our trainer of a shape against what start() starts; a row with its reason where it cannot be had."""
    try:
        with start() as theirs, context.service() as service, context.ours(service, {**shape, **ours}) as trainer:
            return context.row(scenario, rival, shape, trainer, nullcontext(theirs), **more)
    except SideFailed as error:
        return missing(scenario, rival, shape, str(error))
