"""The partial: a shard's statistics of its candidates, and the merge of two partials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """Softmax statistics of one candidate set, per row of hidden.

    lse [N] is the log-sum-exp of its logits, always float64: with logits in the hundreds, a float32 lse would cost the
    shares five digits. mean_row [N, D] is the softmax-weighted mean of slope * row, or None if no gradient is wanted;
    mean_pull [N] is that of d logit / d log scale, or None if the scale is not learned.
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
    """Logistic statistics of one candidate set, per row of hidden; all fields merge by +.

    loss [N] = sum of softplus(z), float64; row [N, D] = sum of sigmoid(z) * slope * row, or None if no gradient is
    wanted; pull [N] = sum of sigmoid(z) * d z / d log scale, or None if the scale is not learned.
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
        """Zeros [N]: a logistic gradient needs no normaliser."""
        return torch.zeros_like(self.loss)


Statistics = Partial | Sums


@dataclass(frozen=True, slots=True)
class Target:
    """Sums over the true labels that a shard owns.

    target_logit = sum_t y_t z_t [N] float64; target_pull = sum_t y_t d z_t / d log scale [N] or None. target_row =
    sum_t y_t slope_t row_t [N, D], or None if no gradient is wanted; with `at` [M] it is [M, D], and its row m belongs
    to row at[m] of hidden: each label is owned by one shard, so a shard's target has few such rows.
    """

    target_logit: Tensor
    target_row: Tensor | None
    target_pull: Tensor | None = None
    at: Tensor | None = None

    def subtracted_from_(self, gradient: Tensor) -> Tensor:
        """Subtract target_row from gradient [N, D], in place.

        Raises:
            ValueError: the target has no rows.
        """
        if self.target_row is None:
            raise ValueError("the target was computed without its rows")
        if self.at is None:
            return gradient.sub_(self.target_row)
        return gradient.index_add_(0, self.at, self.target_row, alpha=-1)


@dataclass(frozen=True, slots=True)
class Spread:
    """The float64 sums that label smoothing needs over all rows v of a shard, with class weights u_v.

    row = sum_v u_v row_v [D], bias = sum_v u_v b_v [].
    """

    row: Tensor
    bias: Tensor


def share(lse: Tensor, total_lse: Tensor) -> Tensor:
    """Return a candidate set's share of the total probability: exp(lse - total_lse) [N]; 0 where both are -inf."""
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
    """Return a + b, or None if either is None."""
    return None if a is None or b is None else a + b


def combine(a: Statistics, b: Statistics) -> Statistics:
    """Combine two statistics: `merge` two partials, `add` two sums."""
    if isinstance(a, Partial) and isinstance(b, Partial):
        return merge(a, b)
    assert isinstance(a, Sums)
    assert isinstance(b, Sums)
    return add(a, b)


def add_targets(a: Target, b: Target) -> Target:
    """Sum two targets, both with `at` or neither; with `at`, their rows are concatenated."""
    assert (a.at is None) == (b.at is None) or a.target_row is None or b.target_row is None
    logit, pull = a.target_logit + b.target_logit, plus(a.target_pull, b.target_pull)
    if a.at is None or b.at is None or a.target_row is None or b.target_row is None:
        return Target(logit, plus(a.target_row, b.target_row), pull)
    return Target(logit, torch.cat([a.target_row, b.target_row]), pull, torch.cat([a.at, b.at]))


def add_all(targets: Sequence[Target]) -> Target:
    """Sum one or more targets from left to right."""
    return reduce(add_targets, targets)


def add_spreads(a: Spread | None, b: Spread | None) -> Spread | None:
    """Return the spread of two shards, or None if either is None."""
    return None if a is None or b is None else Spread(a.row + b.row, a.bias + b.bias)
