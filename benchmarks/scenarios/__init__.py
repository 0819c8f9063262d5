"""The scenarios by name. Each is `run(context) -> rows`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.context import Context
from benchmarks.row import Row

Scenario = Callable[[Context], list[Row]]
SCENARIOS: dict[str, Scenario] = {}
