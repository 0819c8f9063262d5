"""SampleClasses draws from the exact softmax of the live table."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import shardloss
from numpy.typing import NDArray
from scipy import special, stats
from shardloss import LogitTransform

from ..extent import SEED, sample, scaled
from .frequencies import P_VALUE

V, D, S = 19, 4, scaled(5_000, 20_000)
CALLS = scaled(60, 300)
COLD, WARM = LogitTransform(scale=1.7), LogitTransform(scale=0.2)


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    initializer = shardloss.Normal(0.6, seed=8)
    return client.create_table(
        fresh_name(), num_classes=V, dim=D, num_shards=3, placement="mod", initializer=initializer
    )


def softmax_of(
    table: shardloss.Table, hidden: NDArray[np.float64], transform: LogitTransform | None, top_k: int | None
) -> NDArray[np.float64]:
    """Return the softmax probabilities [N, V] in float64; 0 outside the top_k best classes."""
    logits = hidden @ table.read_rows(np.arange(V)).rows.astype(np.float64).T
    logits *= transform.scale if transform else 1.0
    if top_k is not None:
        logits[logits < np.sort(logits, axis=1)[:, [-top_k]]] = -np.inf
    return np.asarray(special.softmax(logits, axis=1))


def assert_fits(class_ids: NDArray[np.int64], probability: NDArray[np.float64]) -> None:
    """Assert that one row's draws pass a chi-square test; classes with fewer than 5 expected draws are pooled."""
    expected = probability * len(class_ids)
    observed = np.bincount(class_ids, minlength=V)
    assert not observed[expected == 0].any()
    rare = expected < 5
    pooled = [np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected)]
    seen = pooled[1] > 0
    assert stats.chisquare(pooled[0][seen], pooled[1][seen]).pvalue > P_VALUE


@pytest.mark.parametrize(
    "transform, top_k",
    sample([(COLD, None), (None, 7), (WARM, 2), (None, V), *product((None, COLD, WARM), (None, 2, 7, V))], 4),
)
def test_draws_fit_the_exact_softmax(
    table: shardloss.Table, rng: np.random.Generator, transform: LogitTransform | None, top_k: int | None
) -> None:
    """The draws of each of three rows pass a chi-square test, over all classes and over the best k only."""
    hidden = rng.standard_normal((3, D)).astype(np.float32).astype(np.float64)
    drawn = table.sample_classes(hidden, S, seed=21 + SEED, top_k=top_k, logits=transform).class_ids
    for row, probability in zip(drawn, softmax_of(table, hidden, transform, top_k), strict=True):
        assert_fits(row, probability)


@pytest.mark.parametrize("keyed_by", ["row", "first_row", "seed"])
def test_one_draw_of_each_of_many_keys_fits_as_well(
    table: shardloss.Table, rng: np.random.Generator, keyed_by: str
) -> None:
    """The first draws of many rows, calls or seeds fit the softmax: neighbouring keys are independent."""
    hidden = np.repeat(rng.standard_normal((1, D)).astype(np.float32).astype(np.float64), 10 * CALLS, axis=0)
    if keyed_by == "row":
        drawn = table.sample_classes(hidden, 1, seed=2 + SEED).class_ids
    else:
        step = {"seed": 1, "first_row": 10}[keyed_by]
        calls = [table.sample_classes(hidden[:10], 1, **{keyed_by: step * n}) for n in range(CALLS)]  # type: ignore[arg-type]
        drawn = np.concatenate([call.class_ids for call in calls])
    assert_fits(drawn[:, 0], softmax_of(table, hidden[:1], None, None)[0])


def test_draws_of_a_row_are_independent_of_each_other(table: shardloss.Table, rng: np.random.Generator) -> None:
    """Pairs of neighbouring draws, and of neighbouring rows, repeat a class as often as the softmax predicts."""
    hidden = np.repeat(rng.standard_normal((1, D)).astype(np.float32).astype(np.float64), 2, axis=0)
    drawn = table.sample_classes(hidden, S, seed=5 + SEED).class_ids
    repeats = float((softmax_of(table, hidden, None, None)[0] ** 2).sum())
    for pairs in (drawn[0].reshape(-1, 2), drawn.T):
        found = int((pairs[:, 0] == pairs[:, 1]).sum())
        assert stats.binomtest(found, len(pairs), repeats).pvalue > P_VALUE
