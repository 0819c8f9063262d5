"""Initial rows and rounding noise depend on their keys alone and are well distributed.

The key of a row's value is (seed, class id, column); that of rounding noise also has the version.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from shardloss_server.numerics.initializer import Initializer, fill_rows_, initial_rows, round_stochastically
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.placement import Placement
from shardloss_server.shard.record import TableSpec
from shardloss_server.shard.table import ShardTable
from torch import Tensor

KINDS = ("normal", "uniform")
P_VALUE = 1e-4  # fixed seeds: a failure means that the bits changed, not bad luck
Cdf = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# The first four of five columns of class ids 0, 1 and 2^31 + 1 with seed 7, as in tables created by older servers.
GOLDEN_ROWS = {
    "normal": [
        [-1.164003039, -0.450756034, -0.165858311, 0.027811864],
        [-0.246537722, 1.102290747, -0.892712265, -0.843351503],
        [0.244252190, 0.128728704, -0.968763906, -1.740005980],
    ],
    "uniform": [
        [-0.082309285, 0.117603984, 0.971916556, -0.052883627],
        [0.056788203, -0.429959696, -0.059121525, 0.240952068],
        [0.925204267, -0.845607430, -0.724705812, 0.338292972],
    ],
}


def rows_of(kind: str, class_ids: Tensor, dim: int, seed: int = 7, scale: float = 1.0) -> Tensor:
    return initial_rows(Initializer(kind, scale, seed), class_ids, dim)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_never_change_between_releases(kind: str) -> None:
    """Seed 7 still gives the literal rows below, including the row of an id beyond 32 bits."""
    rows = rows_of(kind, torch.tensor([0, 1, 2**31 + 1]), 5)
    torch.testing.assert_close(rows[:, :4], torch.tensor(GOLDEN_ROWS[kind]).double(), rtol=0, atol=1e-7)


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 9))
def test_a_row_depends_on_its_class_alone(kind: str, ids: list[int], dim: int) -> None:
    """Any subset of classes, in any order and with repeats, gives each class the row it has on its own."""
    together = rows_of(kind, torch.tensor(ids), dim)
    for class_id, row in zip(ids, together, strict=True):
        assert torch.equal(rows_of(kind, torch.tensor([class_id]), dim)[0], row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_row_begins_like_a_narrow_one(kind: str) -> None:
    """A column does not depend on the number of columns, even if an odd D splits a pair that shares one draw."""
    ids = torch.arange(11)
    assert torch.equal(rows_of(kind, ids, 8)[:, :5], rows_of(kind, ids, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_are_the_rounded_float64_rows(kind: str) -> None:
    """A float32 table starts with the values of a float64 table rounded to nearest, across chunk borders as well."""
    ids = torch.arange(2**18 // 5 + 11)  # more than one chunk of rows of 5 columns
    exact = rows_of(kind, ids, 5, scale=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.empty(len(ids), 5, dtype=dtype)
        fill_rows_(Initializer(kind, 0.02, 7), ids, rows)
        assert torch.equal(rows, exact.to(dtype))


@pytest.mark.parametrize("kind", [*KINDS, "zeros"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_cut_does_not_show_in_a_new_table(kind: str, dtype: str) -> None:
    """K shards, "div" or "mod", start with the same row for each class as a single shard."""
    initializer = Initializer(kind, 0.1, 7)

    def rows(strategy: str, num_shards: int) -> Tensor:
        placement = Placement(strategy, 23, num_shards)
        spec = TableSpec("table", 23, 5, dtype, True, placement, initializer, OptimizerSpec("sgd"))
        shards = [ShardTable(spec, k, 8) for k in range(num_shards)]
        for shard, piece in itertools.product(shards, range(3)):
            shard.fill_(piece, 3)
        assert not any(shard.biases.any() for shard in shards)
        order = torch.cat([placement.class_ids(k, 0, placement.num_rows(k)) for k in range(num_shards)])
        return torch.cat([shard.weights for shard in shards])[torch.argsort(order)]

    whole = rows("div", 1)
    assert whole.any() == (kind != "zeros")
    for strategy, num_shards in itertools.product(("div", "mod"), (2, 3, 7, 29)):
        assert torch.equal(rows(strategy, num_shards), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_standard_deviation_or_the_limit(kind: str) -> None:
    """Rows are proportional to the scale."""
    ids = torch.arange(7)
    torch.testing.assert_close(rows_of(kind, ids, 5, scale=0.25), 0.25 * rows_of(kind, ids, 5))


# Distribution


CDFS: dict[str, Cdf] = {"normal": stats.norm.cdf, "uniform": stats.uniform(-1, 2).cdf}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("first_class", [0, 2**31 - 5000, 2**40])
def test_values_are_distributed_as_named(kind: str, seed: int, first_class: int) -> None:
    """Each column alone, and all together, pass a Kolmogorov-Smirnov test over 10,000 adjacent classes."""
    values = rows_of(kind, torch.arange(first_class, first_class + 10_000), 5, seed).numpy()
    assert stats.kstest(values.ravel(), CDFS[kind]).pvalue > P_VALUE
    assert min(stats.kstest(column, CDFS[kind]).pvalue for column in values.T) > P_VALUE


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_distribution(kind: str) -> None:
    """Mean, variance, skewness and kurtosis over 500,000 values are right to within 5 standard errors."""
    values = rows_of(kind, torch.arange(100_000), 5).numpy().ravel()
    frozen = stats.norm() if kind == "normal" else stats.uniform(-1, 2)
    for power in (1, 2, 3, 4):
        expected, spread = frozen.moment(power), np.sqrt(frozen.moment(2 * power) - frozen.moment(power) ** 2)
        assert abs((values**power).mean() - expected) < 5 * spread / np.sqrt(len(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["values", "squares"])
def test_columns_neighbours_and_seeds_are_uncorrelated(kind: str, of: str) -> None:
    """Values, and their squares, are uncorrelated between columns, adjacent ids, ids 2^32 apart, and seeds."""
    ids, dim = torch.arange(40_000), 7  # an odd D: pairs of columns share one 64-bit draw
    base = rows_of(kind, ids, dim)
    others = {
        "the next id": rows_of(kind, ids + 1, dim),
        "the id 2^32 further": rows_of(kind, ids + 2**32, dim),
        "the next seed": rows_of(kind, ids, dim, seed=8),
        "a far seed": rows_of(kind, ids, dim, seed=7 + 2**32),
    }
    spread = 5 / np.sqrt(len(ids))  # 5 standard errors of a correlation of 0

    def centred(x: Tensor) -> NDArray[np.float64]:
        x = x.square() if of == "squares" else x
        return ((x - x.mean(0)) / x.std(0)).numpy()

    among = centred(base).T @ centred(base) / len(ids)
    assert np.abs(among - np.eye(dim)).max() < spread
    for name, other in others.items():
        assert np.abs(centred(base).T @ centred(other) / len(ids)).max() < spread, name


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_rows_are_alike(kind: str) -> None:
    """Rows of only two columns differ between all seeds and ids."""
    rows = torch.cat([rows_of(kind, torch.arange(20_000), 2, seed) for seed in range(5)])
    assert len(torch.unique(rows, dim=0)) == len(rows)


# Stochastic rounding


def rounded(values: Tensor, seed: int = 7, version: int = 1, first_class: int = 0) -> Tensor:
    return round_stochastically(values, seed, version, torch.arange(first_class, first_class + len(values)))


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the adjacent bfloat16 values, smaller and larger in magnitude, by cutting the 16 low bits of float32."""
    bits = values.numpy().view(np.uint32) & np.uint32(0xFFFF0000)
    up = (bits.astype(np.uint64) + 0x10000).astype(np.uint32)
    return torch.from_numpy(bits.view(np.float32).copy()), torch.from_numpy(up.view(np.float32).copy())


def test_rounding_is_unbiased() -> None:
    """The mean over 4,000 versions is within 5 standard errors of the value, for both signs and all magnitudes."""
    values = torch.randn(50, 3) * 10.0 ** torch.randint(-30, 30, (50, 3))
    low, high = neighbours(values)
    gap = (high - low).double()
    total = torch.zeros(50, 3, dtype=torch.float64)
    for version in range(4000):
        total += (rounded(values, version=version).double() - values.double()) / gap
    share = (values - low).double() / gap  # the expected share of roundings upwards
    standard_error = (share * (1 - share) / 4000).sqrt()
    assert ((total / 4000).abs() <= 5 * standard_error).all()


@given(st.integers(0, 2**32), st.integers(-37, 37))
def test_rounding_goes_to_a_neighbour(seed: int, exponent: int) -> None:
    """A value is never rounded beyond the next bfloat16 below or above it."""
    values = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    low, high = neighbours(values)
    result = rounded(values, version=seed + 1).float()
    assert ((result == low) | (result == high)).all()


def test_representable_values_stay() -> None:
    """A value that is already a bfloat16 is not moved, whatever the noise; nor are zeros and infinities."""
    values = torch.randn(99, 5).to(torch.bfloat16)
    values[0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0])
    for version in range(50):
        assert torch.equal(rounded(values.float(), version=version), values)
    assert torch.isnan(rounded(torch.tensor([[torch.nan]]))).all()


def test_the_noise_is_keyed_by_seed_version_class_and_column() -> None:
    """The same key rounds the same way; another seed, version, class or column rounds independently."""
    values = torch.full((400, 8), 1.0 + 2.0**-8)  # halfway between two neighbours
    base = rounded(values)
    assert torch.equal(rounded(values), base)
    for other in (rounded(values, seed=8), rounded(values, version=2), rounded(values, first_class=400)):
        agreement = float((other == base).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(base.numel())
    ups = (base > 1.0).double()
    assert abs(float(ups.mean()) - 0.5) < 5 * 0.5 / np.sqrt(base.numel())
    assert 0.2 < float(ups.mean(0).min()) < float(ups.mean(0).max()) < 0.8


def test_the_noise_of_a_class_does_not_depend_on_its_companions() -> None:
    """Rounding a subset of rows in another order gives each class the same value, so sharding does not matter."""
    values, ids = torch.randn(30, 5), torch.arange(1000, 1030)
    together = round_stochastically(values, 7, 3, ids)
    order = torch.randperm(30)[:11]
    assert torch.equal(round_stochastically(values[order], 7, 3, ids[order]), together[order])
