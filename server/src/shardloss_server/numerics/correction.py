"""The sampling correction -log Q of candidates, with repeated ids folded into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Folded:
    """Distinct candidates of a draw, ids ascending.

    log_weight [C] is the log of the sum over an id's copies of 1/Q, so that z + log_weight is the log-sum-exp of the
    copies' corrected logits. log_weight_after_hit [C] is the same over the copies that remain in a row which has the
    id as a label (-inf where none remains), or None where hits are kept.
    """

    class_ids: Tensor
    log_weight: Tensor
    log_weight_after_hit: Tensor | None


def fold_repeats(sampled: Tensor, log_expected_count: Tensor, hit_removal: str) -> Folded:
    """Fold a draw into distinct candidates: C ids from S draws.

    sampled [S] int64, log_expected_count [S] = log Q of each draw; hit_removal is "none", "every" or "last" ("last"
    keeps all copies but the last drawn, as TensorFlow 2.21 does: golden case tf_ss_dupsampled_rah). Scoring the
    folded candidates equals scoring the S columns: logsumexp_c(z - log Q_c) = z + logsumexp_c(-log Q_c).
    """
    order = torch.argsort(sampled, stable=True)
    class_ids, inverse, counts = torch.unique_consecutive(sampled[order], return_inverse=True, return_counts=True)
    column = -log_expected_count[order]
    log_weight = grouped_logsumexp(column, inverse, len(class_ids))
    if hit_removal == "none":
        return Folded(class_ids, log_weight, None)
    if hit_removal == "every":
        return Folded(class_ids, log_weight, torch.full_like(log_weight, -torch.inf))
    remaining = column.clone()
    remaining[torch.cumsum(counts, 0) - 1] = -torch.inf
    return Folded(class_ids, log_weight, grouped_logsumexp(remaining, inverse, len(class_ids)))


def grouped_logsumexp(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """log(sum over i with group[i] = j of exp(values[i])) for each group j [num_groups]; -inf for an empty group."""
    top = torch.full((num_groups,), -torch.inf, dtype=values.dtype).scatter_reduce(0, group, values, "amax")
    finite_top = torch.where(torch.isneginf(top), 0.0, top)
    total = torch.zeros(num_groups, dtype=values.dtype).index_add(0, group, torch.exp(values - finite_top[group]))
    return finite_top + torch.log(total)


def find_hits(class_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (row n, candidate c) with class_ids[c] among labels[n].

    class_ids [C] ascending and distinct, labels [N, T] (padding is -1 and never hits). A label given twice yields its
    pair twice. O(N T log C).
    """
    if len(class_ids) == 0:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none
    place = torch.searchsorted(class_ids, labels.contiguous()).clamp_(max=len(class_ids) - 1)
    row, true_index = torch.nonzero(class_ids[place] == labels, as_tuple=True)
    return row, place[row, true_index]
