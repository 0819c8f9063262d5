"""Load tests run where they are asked for by name: `make test-load`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave them out of every other run."""
    return None if "load" in config.option.markexpr else True
