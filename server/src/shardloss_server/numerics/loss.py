"""From merged statistics to losses and gradients of hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss_server.numerics.partial import Partial, Target


def per_example_loss(partial: Partial, target: Target, mass: Tensor) -> Tensor:
    """loss = mass * lse - target_logit [N] float64; 0 where mass = 0, whatever lse is.

    mass [N] is the sum of a row's label weights: 1 for an ordinary row, 0 for an ignored one.
    """
    weighted_lse = torch.where(mass == 0, 0.0, mass * partial.lse)
    return weighted_lse - target.target_logit


def hidden_gradient(partial: Partial, target: Target, mass: Tensor) -> Tensor:
    """d loss / d hidden = mass * mean_row - target_row [N, D], not scaled by an upstream gradient.

    Raises:
        ValueError: the partial was scored without mean rows.
    """
    if partial.mean_row is None or target.target_row is None:
        raise ValueError("a hidden gradient needs partials scored with mean rows")
    return mass[:, None] * partial.mean_row - target.target_row
