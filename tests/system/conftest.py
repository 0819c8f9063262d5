"""Fixtures of the tests that start processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture
def temp() -> Iterator[Path]:
    """A TMPDIR of its own for a started process; its path is short, because a Unix socket's may have 107 bytes."""
    with TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)
