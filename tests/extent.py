"""How much a run covers: a sample of each grid by default, all of it in `make test-long`.

`make test-long` sets SHARDLOSS_TEST_EVERYTHING, which runs whole grids and larger samples, and SHARDLOSS_TEST_SEED, the
seed of statistical tests: fixed in `make test`, new in each long run.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

EVERYTHING = bool(os.environ.get("SHARDLOSS_TEST_EVERYTHING"))
SEED = int(os.environ.get("SHARDLOSS_TEST_SEED") or 0)


def sample(items: Sequence[T], count: int, turn: int = 0) -> list[T]:
    """Return `count` of the items, starting at a different one for each turn; all of them in a full run."""
    if EVERYTHING or count >= len(items):
        return list(items)
    return [items[(turn * count + i) % len(items)] for i in range(count)]


def turn_of(name: str) -> int:
    """Return a turn that depends on the name of a test only, so that different tests sample different items."""
    return zlib.crc32(name.encode())


def scaled(small: int, full: int) -> int:
    """Return a number of draws or steps: `small`, or `full` in a full run."""
    return full if EVERYTHING else small
