"""When two sets of frequencies are those of one distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..extent import SEED

# With a fixed seed a failure means that bits have changed. With fresh seeds some 80 tests must not fail by chance.
P_VALUE = 1e-7 if SEED else 1e-4


def two_sample_z(a: NDArray[np.float64], num_a: int, b: NDArray[np.float64], num_b: int) -> NDArray[np.float64]:
    """Standard scores of the differences of two sets of frequencies [V]."""
    pooled = (a * num_a + b * num_b) / (num_a + num_b)
    return np.asarray((a - b) / np.sqrt(pooled * (1 - pooled) * (1 / num_a + 1 / num_b)))


def one_sample_z(found: NDArray[np.float64], num: int, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard scores of frequencies [V] of num batches against exact ones."""
    return np.asarray((found - expected) / np.sqrt(expected * (1 - expected) / num))


def assert_same_frequencies(z: NDArray[np.float64]) -> None:
    """No score is out of reach of V normal ones, nor is their mean square.

    Inclusions of a batch exclude each other, which makes the mean square smaller than a chi-square's, never larger.
    """
    assert np.abs(z).max() < stats.norm.isf(P_VALUE / (2 * len(z)))
    assert (z**2).sum() < stats.chi2(len(z)).isf(P_VALUE)
