"""A bound on a loss's gradient with respect to the table, so that finite numbers cannot make rows non-finite."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss_server.numerics.margin import LEAST_SINE
from shardloss_server.numerics.transform import LEAST_NORM
from shardloss_server.shard.record import Part


def steepness(part: Part, lse: Tensor) -> Tensor:
    """Return steepness [N], float64: no entry of d sum(g loss) / d table exceeds max_n |g_n| steepness_n.

    It is N * |dz| * |d z / d row|, and 0 in ignored rows. |dz| bounds a row's weights of p and of y, summed over all
    copies of a class in a logistic loss. |d z / d row| bounds the product of hidden as it is scored, a margin's slope,
    and 1 over the least norm. The bound is coarse, but training stays far below the gradients that it excludes.
    """
    batch, objective = part.batch, part.objective
    mass = batch.mass.double()
    weight = 1.0 + 2.0 * mass
    if objective.z_loss:
        weight = weight + torch.where(mass == 0, 0.0, 2.0 * objective.z_loss * mass * lse.abs())
    if objective.family == "logistic":
        num_drawn = 0 if part.candidates is None else part.candidates.class_ids.numel()
        weight = weight * (1.0 + batch.labels.shape[1] + num_drawn)
    slope = 1.0 / LEAST_NORM if objective.transform.normalize else 1.0
    if objective.margin is not None:
        slope *= max(1.0, objective.margin.m1 / LEAST_SINE)
    largest = batch.hidden.abs().amax(1).double().clamp(min=objective.transform.scale)
    return torch.where(mass == 0, 0.0, len(mass) * weight * slope * largest)
