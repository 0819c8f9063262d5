"""The partial: what a shard says about its candidates, and how two of them merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """Softmax statistics of one candidate set, per row of hidden.

    lse [N] is the log-sum-exp of its logits, always float64: at logits of hundreds a float32 lse would cost the shares
    five digits; mean_row [N, D] the softmax-weighted mean of slope * row, or None where no gradient is wanted;
    mean_pull [N] that of d logit / d log scale, or None where the scale is not learned.
    Source: docs/design.md, "The partial".
    """

    lse: Tensor
    mean_row: Tensor | None
    mean_pull: Tensor | None = None

    @staticmethod
    def empty(
        num_rows: int, dim: int, dtype: torch.dtype, with_mean_row: bool = True, with_mean_pull: bool = False
    ) -> Partial:
        """The identity of `merge`: lse = -inf [N], mean_row = 0 [N, D], mean_pull = 0 [N]."""
        lse = torch.full((num_rows,), -torch.inf, dtype=torch.float64)
        mean_row = torch.zeros(num_rows, dim, dtype=dtype) if with_mean_row else None
        return Partial(lse, mean_row, torch.zeros(num_rows, dtype=torch.float64) if with_mean_pull else None)


@dataclass(frozen=True, slots=True)
class Sums:
    """Logistic statistics of one candidate set, per row of hidden: everything merges by +.

    loss [N] = sum of softplus(z), float64; row [N, D] = sum of sigmoid(z) * slope * row, or None where no gradient is
    wanted; pull [N] = sum of sigmoid(z) * d z / d log scale, or None where the scale is not learned.
    """

    loss: Tensor
    row: Tensor | None
    pull: Tensor | None = None

    @staticmethod
    def empty(num_rows: int, dim: int, dtype: torch.dtype, with_row: bool = True, with_pull: bool = False) -> Sums:
        """The identity of `add`: zeros."""
        zeros = torch.zeros(num_rows, dtype=torch.float64)
        return Sums(zeros, torch.zeros(num_rows, dim, dtype=dtype) if with_row else None, zeros if with_pull else None)

    @property
    def lse(self) -> Tensor:
        """0 [N]: a logistic gradient needs no normaliser."""
        return torch.zeros_like(self.loss)


Statistics = Partial | Sums


@dataclass(frozen=True, slots=True)
class Target:
    """Labels a shard owns.

    target_logit = sum_t y_t z_t [N] float64; target_pull = sum_t y_t d z_t / d log scale [N] or None. target_row =
    sum_t y_t slope_t row_t [N, D], or None where no gradient is wanted; with `at` [M] it is [M, D], and each of its
    rows belongs to row at[m] of hidden: a label is one shard's alone, so most shards have little to say.
    """

    target_logit: Tensor
    target_row: Tensor | None
    target_pull: Tensor | None = None
    at: Tensor | None = None

    def subtracted_from_(self, gradient: Tensor) -> Tensor:
        """gradient [N, D] - target_row, in place.

        Raises:
            ValueError: the target has no rows.
        """
        if self.target_row is None:
            raise ValueError("the target was taken without its rows")
        if self.at is None:
            return gradient.sub_(self.target_row)
        return gradient.index_add_(0, self.at, self.target_row, alpha=-1)


@dataclass(frozen=True, slots=True)
class Spread:
    """What label smoothing needs of all rows v of a shard, u_v their class weights: float64 sums.

    row = sum_v u_v row_v [D], bias = sum_v u_v b_v [].
    """

    row: Tensor
    bias: Tensor


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
    share_a, share_b = share(a.lse, lse), share(b.lse, lse)

    def mean(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None or y is None:
            return None
        of_a, of_b = share_a.to(x.dtype), share_b.to(x.dtype)
        return of_a[:, None] * x + of_b[:, None] * y if x.dim() == 2 else of_a * x + of_b * y

    return Partial(lse, mean(a.mean_row, b.mean_row), mean(a.mean_pull, b.mean_pull))


def add(a: Sums, b: Sums) -> Sums:
    """Combine the sums of two candidate sets."""
    return Sums(a.loss + b.loss, plus(a.row, b.row), plus(a.pull, b.pull))


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b; None where one is not there."""
    return None if a is None or b is None else a + b


def combine(a: Statistics, b: Statistics) -> Statistics:
    """`merge` of two partials, `add` of two sums."""
    if isinstance(a, Partial) and isinstance(b, Partial):
        return merge(a, b)
    assert isinstance(a, Sums)
    assert isinstance(b, Sums)
    return add(a, b)


def add_targets(a: Target, b: Target) -> Target:
    """Sum two targets, both with `at` or neither: rows that have their places are put one after the other."""
    assert (a.at is None) == (b.at is None) or a.target_row is None or b.target_row is None
    logit, pull = a.target_logit + b.target_logit, plus(a.target_pull, b.target_pull)
    if a.at is None or b.at is None or a.target_row is None or b.target_row is None:
        return Target(logit, plus(a.target_row, b.target_row), pull)
    return Target(logit, torch.cat([a.target_row, b.target_row]), pull, torch.cat([a.at, b.at]))


def add_all(targets: Sequence[Target]) -> Target:
    """Sum at least one target from left to right."""
    return reduce(add_targets, targets)


def add_spreads(a: Spread | None, b: Spread | None) -> Spread | None:
    """The spread of two shards; None where one is not there."""
    return None if a is None or b is None else Spread(a.row + b.row, a.bias + b.bias)
