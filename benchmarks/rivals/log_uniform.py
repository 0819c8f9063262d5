"""Distinct log-uniform candidates in torch: TensorFlow's draw and its expected counts, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 2  # draws at once per wanted candidate; more are drawn if these are too few


def draw(num_sampled: int, num_classes: int) -> tuple[Tensor, int]:
    """Return the first num_sampled distinct ids of a log-uniform sequence, ascending, and the number of draws."""
    wide = math.log(num_classes + 1)
    draws = torch.empty(0, dtype=torch.int64)
    while True:
        more = torch.rand(FACTOR * num_sampled, dtype=torch.float64).mul_(wide).exp_().long().sub_(1)
        draws = torch.cat([draws, more.clamp_(0, num_classes - 1)]) if len(draws) else more.clamp_(0, num_classes - 1)
        ids, inverse = torch.unique(draws, return_inverse=True)
        if len(ids) >= num_sampled:
            break
    first = torch.full((len(ids),), len(draws)).scatter_reduce_(0, inverse, torch.arange(len(draws)), "amin")
    num_tries = int(first.kthvalue(num_sampled).values) + 1
    return ids[first < num_tries], num_tries


def log_expected_count(ids: Tensor, num_tries: int, num_classes: int) -> Tensor:
    """Return log(1 - (1 - p) ** num_tries) of each id, in float32."""
    ids = ids.double()
    p = ((ids + 2) / (ids + 1)).log_().div_(math.log(num_classes + 1))
    return torch.log(-torch.expm1(num_tries * torch.log1p(-p))).float()
