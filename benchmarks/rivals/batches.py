"""Random batches of one shape, created before anything is timed. Needs only NumPy, so that it runs everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BATCHES = 8  # so many that a batch is out of the caches when it is used again
SEED = 20_240_607


def batches(shape: dict[str, Any], seed: int = SEED) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Yield hidden [N, D] and labels [N] endlessly, cycling through a pool of batches.

    Labels are log-uniform over the classes, like ids sorted by descending frequency.
    """
    rng = np.random.default_rng(seed)
    n, d, v = int(shape["N"]), int(shape["D"]), int(shape["V"])
    pool = []
    for _ in range(NUM_BATCHES):
        hidden = rng.standard_normal((n, d), dtype=np.float32)
        labels = np.exp(rng.random(n) * np.log(v + 1)).astype(np.int64) - 1
        pool.append((hidden, np.clip(labels, 0, v - 1)))
    return cycle(pool)
