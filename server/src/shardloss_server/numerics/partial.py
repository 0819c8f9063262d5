"""The partial: what a shard says about its candidates, and how two of them merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """Softmax statistics of one candidate set, per row of hidden.

    lse [N] is the log-sum-exp of its logits, always float64: at logits of hundreds a float32 lse would cost the shares
    five digits; mean_row [N, D] the softmax-weighted mean of its rows, or None where no
    gradient is wanted. Source: docs/design.md, "The partial".
    """

    lse: Tensor
    mean_row: Tensor | None

    @staticmethod
    def empty(num_rows: int, dim: int, dtype: torch.dtype, with_mean_row: bool = True) -> Partial:
        """The identity of `merge`: lse = -inf [N], mean_row = 0 [N, D]."""
        lse = torch.full((num_rows,), -torch.inf, dtype=torch.float64)
        return Partial(lse, torch.zeros(num_rows, dim, dtype=dtype) if with_mean_row else None)


@dataclass(frozen=True, slots=True)
class Target:
    """Labels a shard owns: target_logit = sum_t y_t z_t [N] float64, target_row = sum_t y_t row_t [N, D] or None."""

    target_logit: Tensor
    target_row: Tensor | None


def share(lse: Tensor, total_lse: Tensor) -> Tensor:
    """The part of the whole's mass that a set holds: exp(lse - total_lse) [N]; 0 where both are -inf."""
    return torch.exp(lse - torch.where(torch.isneginf(total_lse), 0.0, total_lse))


def merge(a: Partial, b: Partial) -> Partial:
    """Combine the partials of two disjoint candidate sets.

    Equals scoring the union: lse = logaddexp(a.lse, b.lse) [N]; mean_row [N, D] is the mean of both, weighted by each
    side's share. Commutative; associative up to rounding; `Partial.empty` is its identity, so a shard that owns no
    candidate needs no special case. Source: docs/design.md, "The partial".
    """
    lse = torch.logaddexp(a.lse, b.lse)
    if a.mean_row is None or b.mean_row is None:
        return Partial(lse, None)
    share_a, share_b = (share(part.lse, lse).to(a.mean_row.dtype)[:, None] for part in (a, b))
    return Partial(lse, share_a * a.mean_row + share_b * b.mean_row)


def merge_all(partials: Sequence[Partial]) -> Partial:
    """Merge at least one partial from left to right, so that the same order gives the same bits."""
    merged = partials[0]
    for partial in partials[1:]:
        merged = merge(merged, partial)
    return merged


def add_all(targets: Sequence[Target]) -> Target:
    """Sum at least one target from left to right."""
    logit, row = targets[0].target_logit, targets[0].target_row
    for target in targets[1:]:
        logit = logit + target.target_logit
        row = None if row is None or target.target_row is None else row + target.target_row
    return Target(logit, row)
