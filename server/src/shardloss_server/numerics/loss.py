"""Losses and their gradients with respect to hidden and scale, computed from merged statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.partial import Partial, Spread, Statistics, Target


@dataclass(frozen=True, slots=True)
class Merged:
    """The answers of all shards to one part, merged."""

    statistics: Statistics
    target: Target
    spread: Spread | None


def mass_of_gradient(mass: Tensor, is_unit: bool) -> Tensor:
    """Return the mass [N] that gradients use: mass itself or, if is_unit, 1 for every row with mass != 0."""
    return (mass != 0).to(mass.dtype) if is_unit else mass


def weight_of_softmax(mass: Tensor, lse: Tensor, z_loss: float) -> Tensor:
    """Return the factor of p in d loss / d z [N]: mass * (1 + 2 z_loss lse); 0 where mass = 0, whatever lse is."""
    if not z_loss:
        return mass
    return torch.where(mass == 0, 0.0, mass * (1.0 + 2.0 * z_loss * lse)).to(mass.dtype)


def per_example_loss(
    merged: Merged, mass: Tensor, z_loss: float = 0.0, spread: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Return the loss of each row [N] float64; 0 where mass = 0.

    softmax: mass * (lse + z_loss lse^2) - target_logit - spread * sum_v u_v z_v; logistic: sum of softplus(z) -
    target_logit. mass [N] is the sum of a row's weights: 1 for an ordinary row, 0 for an ignored one. spread [N] is the
    weight of every class under label smoothing; hidden [N, D] is what was scored. Source of z_loss: PaLM, section 5.
    """
    statistics, target = merged.statistics, merged.target
    if not isinstance(statistics, Partial):
        return torch.where(mass == 0, 0.0, statistics.loss - target.target_logit)
    lse = statistics.lse
    loss = torch.where(mass == 0, 0.0, mass * (lse + z_loss * lse * lse)) - target.target_logit
    return loss if spread is None else loss - spread * sum_of_logits(merged, given(hidden))


def hidden_gradient(merged: Merged, mass: Tensor, z_loss: float = 0.0, spread: Tensor | None = None) -> Tensor:
    """Return d loss / d hidden [N, D] = weight * mean_row - target_row - spread * sum_v u_v row_v, without upstream.

    Raises:
        ValueError: the part was scored without gradients.
    """
    statistics, target = merged.statistics, merged.target
    if not isinstance(statistics, Partial):
        return torch.where((mass == 0)[:, None], 0.0, target.subtracted_from_(given(statistics.row).clone()))
    weight = weight_of_softmax(mass, statistics.lse, z_loss)
    gradient = target.subtracted_from_(weight[:, None] * given(statistics.mean_row))
    if merged.spread is None or spread is None:
        return gradient
    return gradient - (spread.double()[:, None] * merged.spread.row).to(gradient.dtype)


def scale_gradient(
    merged: Merged, mass: Tensor, z_loss: float, scale: float, spread: Tensor | None, hidden: Tensor
) -> Tensor:
    """Return d loss / d scale [N] float64; arguments as in `per_example_loss`.

    Raises:
        ValueError: the part was scored without pulls.
    """
    statistics, target = merged.statistics, merged.target
    if not isinstance(statistics, Partial):
        return torch.where(mass == 0, 0.0, given(statistics.pull) - given(target.target_pull)) / scale
    pull = weight_of_softmax(mass, statistics.lse, z_loss) * given(statistics.mean_pull) - given(target.target_pull)
    if spread is not None:
        pull = pull - spread * sum_of_logits(merged, hidden)
    return pull / scale


def sum_of_logits(merged: Merged, hidden: Tensor) -> Tensor:
    """Return sum_v u_v z_v [N] float64 over all classes.

    Raises:
        ValueError: the part was scored without label smoothing.
    """
    if merged.spread is None:
        raise ValueError("the part was scored without the sums that label smoothing needs")
    return hidden.double() @ merged.spread.row + merged.spread.bias


def given(tensor: Tensor | None) -> Tensor:
    """Return a tensor that a gradient needs, if the score computed it.

    Raises:
        ValueError: the part was scored without it.
    """
    if tensor is None:
        raise ValueError("the part was scored without a tensor that its gradient needs")
    return tensor
