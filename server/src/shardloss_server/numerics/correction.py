"""The sampling correction -log Q of candidates, with repeated ids folded into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shardloss.sampling import draws
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Folded:
    """The candidates of a draw, ids ascending; distinct if they were folded.

    log_weight [C] is the log of the sum of 1/Q over an id's copies, so z + log_weight is the log-sum-exp of the copies'
    corrected logits. log_weight_after_hit [C] is the same over the copies that remain in a row that has the id as a
    label (-inf if none remains), or None if hits are kept.
    """

    class_ids: Tensor
    log_weight: Tensor
    log_weight_after_hit: Tensor | None


def in_order(class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [S] in ascending order and the order [S] that sorts them; copies keep their order."""
    if class_ids.device.type != "cpu":
        ordered_there, place_there = torch.sort(class_ids, stable=True)
        return ordered_there, place_there
    ordered, place = draws.in_order(class_ids.numpy())
    return torch.from_numpy(ordered), torch.from_numpy(place)


def fold_repeats(sampled: Tensor, log_expected_count: Tensor, hit_removal: str) -> Folded:
    """Fold a draw into distinct candidates: C ids from S draws.

    sampled [S] int64, log_expected_count [S] = log Q of each draw; hit_removal is "none", "every" or "last" ("last"
    keeps all copies but the last drawn, as TensorFlow 2.21 does: golden case tf_ss_dupsampled_rah). Scoring the
    folded candidates equals scoring the S columns: logsumexp_c(z - log Q_c) = z + logsumexp_c(-log Q_c).
    """
    ordered, order = in_order(sampled)
    column = -log_expected_count[order]
    if bool((ordered[1:] > ordered[:-1]).all()):  # true of every draw of distinct ids
        after_hit = None if hit_removal == "none" else torch.full_like(column, -torch.inf)
        return Folded(ordered, column, after_hit)
    class_ids, inverse, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    log_weight = grouped_logsumexp(column, inverse, len(class_ids))
    if hit_removal == "none":
        return Folded(class_ids, log_weight, None)
    if hit_removal == "every":
        return Folded(class_ids, log_weight, torch.full_like(log_weight, -torch.inf))
    remaining = column.clone()
    remaining[torch.cumsum(counts, 0) - 1] = -torch.inf
    return Folded(class_ids, log_weight, grouped_logsumexp(remaining, inverse, len(class_ids)))


def in_id_order(
    sampled: Tensor, log_expected_count: Tensor, hit_removal: str, hit_ids: Tensor | None = None
) -> tuple[Folded, Tensor]:
    """Return a draw's S columns by ascending id, with a separate column per copy, and the order [S] that sorts them.

    For losses that are not a log-sum-exp over columns. hit_removal as in `fold_repeats`; if hits are found by
    hit_ids [S], columns with the same hit id count as copies.
    """
    class_ids, order = in_order(sampled)
    log_weight = -log_expected_count[order]
    if hit_removal == "none":
        return Folded(class_ids, log_weight, None), order
    after_hit = torch.full_like(log_weight, -torch.inf)
    if hit_removal == "last":
        keys = sampled if hit_ids is None else hit_ids
        after_hit = torch.where(last_copies(keys[None])[0][order], -torch.inf, log_weight)
    return Folded(class_ids, log_weight, after_hit), order


def row_hits(sampled: Tensor, labels: Tensor, hit_removal: str) -> Tensor:
    """Return a mask of those of the rows' own candidates [N, S] that are removed; labels [N, T] have negative padding.

    hit_removal as in `fold_repeats`; "last" removes only the last copy of each id.
    """
    hit = torch.zeros_like(sampled, dtype=torch.bool)
    if hit_removal == "none":
        return hit
    for column in labels.T:  # T passes over [N, S]: never [N, S, T] at once
        hit |= (sampled == column[:, None]) & (column >= 0)[:, None]
    return hit & last_copies(sampled) if hit_removal == "last" else hit


def last_copies(sampled: Tensor) -> Tensor:
    """Return a mask of the entries of sampled [N, S] that are the last occurrence of their id in the row."""
    order = torch.argsort(sampled, dim=1, stable=True)
    ordered = sampled.gather(1, order)
    is_last = torch.ones_like(sampled, dtype=torch.bool)
    is_last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(is_last).scatter_(1, order, is_last)


def total_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """Return, for each of labels [N, T], the sum of the weights [N, T] of all entries of its row with the same id."""
    order = torch.argsort(labels, dim=1, stable=True)
    ordered, place = labels.gather(1, order), torch.zeros_like(labels)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)  # the number of the entry's id in its row
    total = torch.zeros_like(weights).scatter_add_(1, place, weights.gather(1, order)).gather(1, place)
    return torch.zeros_like(weights).scatter_(1, order, total)


def grouped_logsumexp(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Return log(sum over i with group[i] = j of exp(values[i])) of each group j [num_groups]; -inf if it is empty."""
    top = torch.full((num_groups,), -torch.inf, dtype=values.dtype).scatter_reduce(0, group, values, "amax")
    finite_top = torch.where(torch.isneginf(top), 0.0, top)
    total = torch.zeros(num_groups, dtype=values.dtype).index_add(0, group, torch.exp(values - finite_top[group]))
    return finite_top + torch.log(total)


def find_hits(keys: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs (row n, place c) with keys[c] among labels[n].

    keys [C] are ascending; repeats are allowed, and each copy gives its own pair. labels [N, T]; padding is negative
    and never hits if keys are not. A label given twice gives its pairs once: at most N C pairs. O(N T log (C T)).
    """
    num_rows, num_true = labels.shape
    if num_true > 1:
        labels = labels.sort(1).values
        is_repeated = torch.zeros_like(labels, dtype=torch.bool)
        is_repeated[:, 1:] = labels[:, 1:] == labels[:, :-1]
        labels = torch.where(is_repeated, -1, labels)
    flat = labels.flatten()
    first = torch.searchsorted(keys, flat)
    counts = torch.searchsorted(keys, flat, right=True) - first
    entry = torch.repeat_interleave(torch.arange(num_rows * num_true), counts)
    nth = torch.arange(len(entry)) - (counts.cumsum(0) - counts)[entry]
    return entry // num_true, first[entry] + nth
