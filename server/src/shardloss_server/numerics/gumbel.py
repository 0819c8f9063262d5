"""Draws from a softmax as races: the class of the largest logit plus Gumbel noise wins with its softmax probability.

The noise is a function of (seed, row number, draw number, class id) alone, so a race can be run piece by piece in any
order: the winner of the winners is the winner of all. Instead of the largest z - log(e), with e exponential, a piece
looks for the smallest e * exp(top - z), which saves one logarithm per class.
Source: Gumbel 1954; Maddison, Tarlow, Minka 2014, A* Sampling, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss_server.numerics.initializer import CHUNK_ELEMENTS, GOLDEN_GAMMA, mix_, random_bits

DRAW_STREAM = 0x64726177  # separates the keys of draws from those of initial values and rounding, which count from 0


def draw_keys(seed: int, first_row: int, num_rows: int, num_samples: int) -> Tensor:
    """Return the noise key of each draw [N, S] int64, for rows first_row, first_row + 1, ..."""
    row_numbers = torch.arange(num_rows) + first_row
    return random_bits(seed, DRAW_STREAM, row_numbers, num_samples)


def class_keys(class_ids: Tensor) -> Tensor:
    """Return the noise key of each class id, int64 of the same shape."""
    return mix_(class_ids * GOLDEN_GAMMA)


def exponentials(draws: Tensor, classes: Tensor) -> Tensor:
    """Return the exponential noise of pairs of draw keys and class keys, which broadcast; float64, > 0 and finite.

    -log1p(-u) with u of 52 bits: u stays inside (0, 1), and its small values, which win races, keep their precision.
    """
    bits = mix_(draws + classes).bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    return bits.double().add_(0.5).mul_(-(2.0**-52)).log1p_().neg_()


def race(logits: Tensor, class_ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Find the winner of each draw [N, S] among classes class_ids [N, R] or [1, R] with logits [N, R] float64, R >= 1.

    Returns the winners' scores, max over R of logit + noise, and their columns, each [N, S]. A row with a nan
    logit has scores of nan; a logit of -inf never wins.
    """
    num_rows, num_samples = draws.shape
    top = logits.amax(1, keepdim=True)
    handicap, classes = torch.exp(top - logits), class_keys(class_ids).expand(num_rows, -1)
    finish, winner = torch.empty(draws.shape, dtype=torch.float64), torch.empty_like(draws)
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])  # draws at once
    rows_at_once = max(1, size // max(1, num_samples))
    for row in range(0, num_rows, rows_at_once):
        n = slice(row, row + rows_at_once)
        for start in range(0, num_samples, size):
            s = slice(start, start + size)
            times = exponentials(draws[n, s, None], classes[n, None, :]).mul_(handicap[n, None, :])
            finish[n, s], winner[n, s] = times.min(2)
    return top - finish.log_(), winner
