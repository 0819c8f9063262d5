"""Load tests run only on explicit request: `make test-load`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the load tests in every other run."""
    return None if "load" in config.option.markexpr else True
