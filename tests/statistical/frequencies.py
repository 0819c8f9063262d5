"""Statistical tests of the hypothesis that two sets of frequencies come from the same distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..extent import SEED

# With a fixed seed, a failure means that bits have changed. With fresh seeds, about 80 tests must not fail by chance.
P_VALUE = 1e-7 if SEED else 1e-4


def two_sample_z(a: NDArray[np.float64], num_a: int, b: NDArray[np.float64], num_b: int) -> NDArray[np.float64]:
    """Return the standard scores [V] of the differences between two sets of frequencies [V]."""
    pooled = (a * num_a + b * num_b) / (num_a + num_b)
    return np.asarray((a - b) / np.sqrt(pooled * (1 - pooled) * (1 / num_a + 1 / num_b)))


def one_sample_z(found: NDArray[np.float64], num: int, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard scores [V] of the frequencies [V] found in num batches against the exact ones."""
    return np.asarray((found - expected) / np.sqrt(expected * (1 - expected) / num))


def assert_same_frequencies(z: NDArray[np.float64]) -> None:
    """Assert that the largest score and the mean square are plausible for V standard normal scores.

    Inclusions in a batch are negatively correlated, which makes the sum of squares smaller than a chi-square's, never
    larger.
    """
    assert np.abs(z).max() < stats.norm.isf(P_VALUE / (2 * len(z)))
    assert (z**2).sum() < stats.chi2(len(z)).isf(P_VALUE)
