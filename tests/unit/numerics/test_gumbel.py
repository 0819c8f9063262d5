"""Sampling by races: the noise is exponential and a function of its keys, and pieces race to the same winner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from shardloss_server.numerics.gumbel import class_keys, draw_keys, exponentials, race
from torch import Tensor

P_VALUE = 1e-4  # fixed seeds: a failure means that the bits changed, not bad luck


def noise(seed: int, num_rows: int, num_samples: int, num_classes: int) -> Tensor:
    """Return exponential noise [N, S, V]."""
    draws = draw_keys(seed, 0, num_rows, num_samples)
    return exponentials(draws[:, :, None], class_keys(torch.arange(num_classes)))


@pytest.mark.parametrize("sizes", [(1, 1, 40_000), (1, 40_000, 1), (40_000, 1, 1), (30, 40, 35)])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_noise_is_exponential_along_every_key(sizes: tuple[int, int, int], seed: int) -> None:
    """The noise passes a Kolmogorov-Smirnov test along rows, draws and classes, and adjacent keys are uncorrelated."""
    found = noise(seed, *sizes).flatten().numpy()
    assert stats.kstest(found, "expon").pvalue > P_VALUE
    neighbours = np.corrcoef(stats.norm.ppf(stats.expon.cdf(found)).reshape(-1, 2).T)[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(found) / 2)


def test_seeds_rows_draws_and_classes_each_have_noise_of_their_own() -> None:
    """10,000 keys under each of two seeds give 20,000 different values."""
    both = torch.cat([noise(seed, 10, 20, 50).flatten() for seed in (1, 2)])
    assert len(both.unique()) == len(both)


def test_noise_is_positive_and_finite_for_any_bits() -> None:
    """Noise of 0 or inf would always win or lose; upper bits of all ones or all zeros give neither."""
    draws = torch.arange(-200_000, 200_000)
    found = exponentials(draws, torch.tensor(0))
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    smallest, largest = (
        torch.tensor(bits).double().add_(0.5).mul_(-(2.0**-52)).log1p_().neg_() for bits in (0, 2**52 - 1)
    )
    assert 0 < smallest < 2.0**-52
    assert 36 < largest < 37.5


@pytest.mark.parametrize("num_samples", [1, 3, 1000])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_the_winner_of_the_winners_is_the_winner(num_samples: int, pieces: int) -> None:
    """However the classes are split, the same class wins, with the score logit + noise."""
    logits = 3 * torch.randn(5, 97, dtype=torch.float64)
    draws = draw_keys(11, 4, 5, num_samples)
    ids = torch.arange(97)[None]
    scores, columns = race(logits, ids, draws)
    found = [
        (race(logits[:, part], ids[:, part], draws), ids[0, part]) for part in np.array_split(np.arange(97), pieces)
    ]
    best = torch.stack([piece[0] for piece, _ in found])
    winners = torch.stack([part[piece[1]] for piece, part in found])
    assert torch.equal(winners.gather(0, best.argmax(0)[None])[0], columns)
    torch.testing.assert_close(best.amax(0), scores, rtol=0, atol=1e-13)
    exponential = exponentials(draws[:, :, None], class_keys(ids)[:, None, :])
    torch.testing.assert_close((logits[:, None] - exponential.log()).amax(2), scores, rtol=0, atol=1e-13)


def test_classes_of_their_own_a_row_race_as_shared_ones() -> None:
    """With class_ids [N, R] in any order, the noise belongs to the class and not to its column."""
    logits, draws = torch.randn(4, 9, dtype=torch.float64), draw_keys(2, 0, 4, 50)
    _, columns = race(logits, torch.arange(9)[None], draws)
    order = torch.stack([torch.randperm(9) for _ in range(4)])
    _, moved = race(logits.gather(1, order), order, draws)
    assert torch.equal(order.gather(1, moved), columns)


def test_far_logits_neither_overflow_nor_win() -> None:
    """A logit of -inf never wins, 1e4 always beats -1e4, and a nan logit gives a nan score."""
    logits = torch.tensor(
        [[1e4, -1e4, -torch.inf], [-torch.inf, -1e4, -1e4], [0.0, torch.nan, 1.0]], dtype=torch.float64
    )
    scores, columns = race(logits, torch.arange(3)[None], draw_keys(0, 0, 3, 200))
    assert not columns[0].any()
    assert set(columns[1].tolist()) == {1, 2}
    assert torch.isfinite(scores[:2]).all()
    assert scores[2].isnan().all()
