"""Random batches of one shape, made before anything is timed. Needs NumPy alone, so every environment can draw them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BATCHES = 8  # enough that nothing of one batch is warm for the next
SEED = 20_240_607


def batches(shape: dict[str, Any], seed: int = SEED) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Hidden [N, D] and labels [N] without end: a pool that goes round.

    Labels are log-uniform over the classes, as ids sorted by falling frequency are.
    """
    rng = np.random.default_rng(seed)
    n, d, v = int(shape["N"]), int(shape["D"]), int(shape["V"])
    pool = []
    for _ in range(NUM_BATCHES):
        hidden = rng.standard_normal((n, d), dtype=np.float32)
        labels = np.exp(rng.random(n) * np.log(v + 1)).astype(np.int64) - 1
        pool.append((hidden, np.clip(labels, 0, v - 1)))
    return cycle(pool)
