"""The service against one rival that has to be started for it, and may not be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.context import Context
from benchmarks.row import Row, missing
from benchmarks.side import Side, SideFailed


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
