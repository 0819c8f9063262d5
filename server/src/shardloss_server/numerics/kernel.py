"""The computation of a shard: statistics of columns, and the gradient of its rows.

Columns come in two shapes. A `Block` is dense: its rows are candidates of every row of hidden (the full softmax in
chunks of rows, a sampled loss in ranges of candidates). `Entries` are sparse: each is a column of a single row of
hidden (true labels, a row's own candidates). Rows are in compute dtype and already transformed: they are unit vectors
if the transform normalises, and scale is folded into hidden and biases. Nothing of size N x V is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.correction import find_hits, grouped_logsumexp
from shardloss_server.numerics.exponentials import (
    CACHED,
    Exponentials,
    Narrow,
    Rescaled,
    exp_,
    finite_lse,
)
from shardloss_server.numerics.loss import given
from shardloss_server.numerics.margin import with_margin
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.partial import Partial, Statistics, Sums, Target
from shardloss_server.numerics.transform import cap_, cap_slope

CHUNK_LOGITS = 1 << 19  # logits of a block of rows or candidates: 2 MiB of float32 stay near the cache
ENTRY_ELEMENTS = 1 << 24  # elements of entries' rows that are gathered at once


@dataclass(frozen=True, slots=True)
class Entries:
    """Columns of single rows of hidden, flattened to L entries.

    batch_row [L], ascending, is each entry's row of hidden; row_index [L] is its row in the shard, with values rows
    [L, D] and biases [L]; norms [L] are what the rows were divided by, or None. weight [L] = y, or None for y = 0;
    log_weight [L] = -log Q, or None for 0.
    """

    batch_row: Tensor
    row_index: Tensor
    rows: Tensor
    biases: Tensor
    norms: Tensor | None
    weight: Tensor | None
    log_weight: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors keep allocated, in bytes; for a view this is its whole storage."""
        own = (self.batch_row, self.row_index, self.rows, self.biases, self.norms, self.weight, self.log_weight)
        storages = [x.untyped_storage() for x in own if x is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True, slots=True)
class Hits:
    """The accidental hits to remove: labels [N, T] (padding negative) to look for among the keys of a block.

    keys [C] are ascending; order [C] is the column of each key, or None if columns are in key order. log_weight [C]
    replaces the block's in a row that has the column as a label.
    """

    labels: Tensor
    keys: Tensor
    order: Tensor | None
    log_weight: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Columns shared by all rows of hidden: rows [C, D], biases [C], log_weight [C] = -log Q or None for 0.

    norms [C] are what the rows were divided by, or None.
    """

    rows: Tensor
    biases: Tensor
    norms: Tensor | None
    log_weight: Tensor | None
    hits: Hits | None


@dataclass(frozen=True, slots=True)
class Columns:
    """The logits of columns [...], corrected and transformed.

    slope [...] is the derivative with respect to the logit before the cap (or margin), None for 1; pull [...] = d z / d
    log scale, None if not requested.
    """

    logits: Tensor
    slope: Tensor | None
    pull: Tensor | None


def transformed(logits: Tensor, log_weight: Tensor | None, objective: Objective) -> Columns:
    """Cap and correct plain logits, which are overwritten: cap(z) + log_weight."""
    slope, cap = None, objective.transform.soft_cap
    pull = logits.clone() if objective.learned_scale else None
    if cap is not None:
        logits = cap_(logits, cap)
        slope = cap_slope(logits, cap)
        pull = None if pull is None else pull.mul_(slope)
    return Columns(logits if log_weight is None else logits.add_(log_weight), slope, pull)


def block_columns(hidden: Tensor, block: Block, objective: Objective, out: Tensor | None = None) -> Columns:
    """Compute the columns [N, C] of a block, without accidental hits; plain logits are written to `out` if given."""
    if objective.transform.soft_cap is None and not objective.learned_scale:
        offset = block.biases if block.log_weight is None else block.biases + block.log_weight
        columns = Columns(torch.addmm(offset, hidden, block.rows.T, out=out), None, None)
    else:
        columns = transformed(torch.addmm(block.biases, hidden, block.rows.T), block.log_weight, objective)
    if block.hits is not None:
        remove_hits_(columns.logits, block.hits, block.log_weight)
    return columns


def remove_hits_(logits: Tensor, hits: Hits, log_weight: Tensor | None) -> None:
    """Set the log weight of each accidental hit to what remains of it, in place; -inf removes the column."""
    batch_row, place = find_hits(hits.keys, hits.labels)
    if len(place) == 0:
        return
    column = place if hits.order is None else hits.order[place]
    remaining = hits.log_weight[column]
    change = remaining if log_weight is None else remaining - log_weight[column]
    logits[batch_row, column] = logits[batch_row, column] + change


def entry_columns(hidden: Tensor, entries: Entries, objective: Objective) -> Columns:
    """Compute the columns [L] of entries; true ones get the margin."""
    logits = entry_products(hidden, entries).add_(entries.biases)
    if objective.margin is None or entries.weight is None:
        return transformed(logits, entries.log_weight, objective)
    logits, slope = with_margin(logits, objective.margin, objective.transform.scale)
    pull = logits.clone() if objective.learned_scale else None
    return Columns(logits if entries.log_weight is None else logits + entries.log_weight, slope, pull)


def entry_products(hidden: Tensor, entries: Entries) -> Tensor:
    """Compute hidden . row [L] of entries, in pieces that stay in the cache."""
    if len(entries.rows) == 0:
        return torch.zeros(0, dtype=hidden.dtype)
    pieces = (torch.split(of, max(1, CACHED // hidden.shape[1])) for of in (entries.batch_row, entries.rows))
    return torch.cat([torch.index_select(hidden, 0, n).mul_(rows).sum(1) for n, rows in zip(*pieces, strict=True)])


def sum_of_rows(num_rows: int, entries: Entries, factor: Tensor) -> Tensor:
    """Sum factor [L] times the rows of entries over the entries of each row of hidden: [N, D]."""
    return bags(factor, torch.arange(len(factor)), entries.rows, torch.bincount(entries.batch_row, minlength=num_rows))


def bags(factor: Tensor, place: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Sum factor [L] times rows [M, D] at place [L] into bags [B, D]; counts [B] is the number of terms of each bag.

    embedding_bag allocates nothing of size L x D; index_add_ would need that as input, and runs at 2 GB/s.
    """
    if len(factor) == 0:
        return torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype)
    first = counts.cumsum(0) - counts
    return torch.nn.functional.embedding_bag(place, rows, first, mode="sum", per_sample_weights=factor)


def sloped(values: Tensor, slope: Tensor | None) -> Tensor:
    """Return values * slope; a slope of None means 1."""
    return values if slope is None else values * slope


def softplus(logits: Tensor) -> Tensor:
    """Return log(1 + exp(z)), exact to the last digit even if torch.nn.functional.softplus returns z itself."""
    return torch.logaddexp(logits, torch.zeros((), dtype=logits.dtype))


# Statistics


class SoftmaxSums:
    """Softmax statistics of one block of columns after another, as sums relative to the largest logit so far.

    Blocks are added directly, without merging a partial per block. `start` is included; rows and pulls are summed only
    if it has mean_row and mean_pull, and sums of rows are of `dtype`. A row may have no columns yet, or none at all.
    """

    def __init__(self, start: Partial, dtype: torch.dtype) -> None:
        self._start, self._is_empty = start, True
        self._top = start.lse.to(dtype)
        self._finite_top = finite_lse(self._top)
        self._total = torch.exp(start.lse - self._finite_top)
        self._row = None if start.mean_row is None else start.mean_row * self._total.to(dtype)[:, None]
        self._pull = None if start.mean_pull is None else start.mean_pull * self._total

    def add_(self, columns: Columns, rows: Tensor) -> Exponentials | None:
        """Add a block's columns [N, C], whose logits are overwritten, with its rows [C, D].

        Returns the block's exponentials if a step can reuse them, that is, if logits have slope 1; else None.
        """
        logits = columns.logits
        if logits.shape[1] == 0:
            return None
        largest = logits.amax(1)
        if self._is_empty or bool((largest > self._top).any()):
            self._raise(torch.maximum(self._top, largest))
        values = exp_(logits.sub_(self._finite_top[:, None]))
        self._total += values.sum(1)
        if self._pull is not None:
            self._pull += (values * given(columns.pull)).sum(1)
        if self._row is not None:
            self._row.addmm_(sloped(values, columns.slope), rows)
        return Exponentials(values, self._finite_top) if columns.slope is None else None

    def add_narrow_(self, narrow: Narrow, rows: Tensor, out: Tensor | None) -> Exponentials:
        """Add the next block of `narrow`, rows [C, D] of bfloat16, C >= 1; return its exponentials, stored in `out`."""
        exponentials, total = narrow.of(rows, out)
        if exponentials.top is not self._top:
            self._raise(exponentials.top)
        self._total += total
        if self._row is not None:
            self._row += exponentials.values @ rows
        return exponentials

    def _raise(self, top: Tensor) -> None:
        """Rescale the sums to another top [N], which is nowhere below the one before."""
        finite_top = finite_lse(top)
        left = torch.exp(self._top.double() - finite_top)
        self._top, self._finite_top, self._is_empty = top, finite_top, False
        self._total *= left
        if self._row is not None:
            self._row *= left.to(self._row.dtype)[:, None]
        if self._pull is not None:
            self._pull *= left

    def partial(self) -> Partial:
        """Return the partial of all blocks so far."""
        if self._is_empty:
            return self._start
        lse = self._finite_top.double() + self._total.log()
        total = torch.where(self._total == 0, 1.0, self._total)
        mean_row = None if self._row is None else self._row / total.to(self._row.dtype)[:, None]
        return Partial(lse, mean_row, None if self._pull is None else self._pull / total)


def block_sums(columns: Columns, rows: Tensor, with_gradient: bool) -> Sums:
    """Compute the logistic statistics of a block."""
    loss = softplus(columns.logits).sum(1, dtype=torch.float64)
    probability = torch.sigmoid(columns.logits)
    pull = None if columns.pull is None else (probability * columns.pull).sum(1, dtype=torch.float64)
    return Sums(loss, sloped(probability, columns.slope) @ rows if with_gradient else None, pull)


def entry_statistics(num_rows: int, entries: Entries, columns: Columns, with_gradient: bool, family: str) -> Statistics:
    """Compute the statistics of entries, each of which is a column of a single row of hidden."""
    if family == "logistic":
        share = torch.sigmoid(columns.logits)
        loss = by_row(num_rows, entries, softplus(columns.logits).double())
    else:
        loss = grouped_logsumexp(columns.logits.double(), entries.batch_row, num_rows)
        share = torch.exp(columns.logits.double() - finite_lse(loss)[entries.batch_row]).to(columns.logits.dtype)
    row = None
    if with_gradient:
        row = sum_of_rows(num_rows, entries, sloped(share, columns.slope))
    pull = None if columns.pull is None else by_row(num_rows, entries, (share * columns.pull).double())
    return Sums(loss, row, pull) if family == "logistic" else Partial(loss, row, pull)


def by_row(num_rows: int, entries: Entries, values: Tensor) -> Tensor:
    """Sum values [L] over the entries of each row of hidden: [N]."""
    return torch.zeros(num_rows, dtype=values.dtype).index_add_(0, entries.batch_row, values)


def target_of(num_rows: int, entries: Entries, columns: Columns, with_gradient: bool) -> Target:
    """Compute the sums of y z [N], y slope row [M, D] and y pull [N] over the owned true columns; batch_row ascends."""
    assert entries.weight is not None
    counts, weight = entries.weight != 0, entries.weight
    logit = by_row(num_rows, entries, torch.where(counts, weight.double() * columns.logits.double(), 0.0))
    pull = None if columns.pull is None else by_row(num_rows, entries, (weight * columns.pull).double())
    if not with_gradient:
        return Target(logit, None, pull)
    at, counts = torch.unique_consecutive(entries.batch_row, return_counts=True)
    factor = sloped(weight, columns.slope)
    return Target(logit, bags(factor, torch.arange(len(factor)), entries.rows, counts), pull, at)


# Gradients


def block_gradient(columns: Columns, lse: Tensor, scale: Tensor, family: str) -> Tensor:
    """Compute dz [N, C] = scale * p * slope (z before cap or margin) in place of the logits; scale [N] = g * weight.

    p = exp(z - lse) with lse [N] float64, or sigmoid(z). lse is split into a value of the logits' dtype and a remainder
    that is moved into the scale, so its rounding costs nothing.
    """
    if family == "logistic":
        probability = columns.logits.sigmoid_()
    else:
        lse = finite_lse(lse)
        held = lse.to(columns.logits.dtype)
        scale = scale * torch.exp(held.double() - lse).to(scale.dtype)
        probability = exp_(columns.logits.sub_(held[:, None]))
    dz = probability.mul_(scale[:, None])
    return dz if columns.slope is None else dz.mul_(columns.slope)


def entry_gradient(
    batch_row: Tensor,
    weight: Tensor | None,
    columns: Columns,
    upstream: Rescaled,
    g: Tensor,
    family: str,
    apart: bool,
) -> Tensor:
    """Compute dz [L] of entries of weight y: (scale p - g y) slope if apart, else -g y slope (p is elsewhere)."""
    n, logits = batch_row, columns.logits
    dz = torch.zeros_like(logits) if weight is None else -g[n] * weight
    if apart:
        if family == "logistic":
            probability = torch.sigmoid(logits)
        else:
            probability = torch.exp(logits.double() - finite_lse(upstream.lse)[n]).to(logits.dtype)
        dz = dz.add_(upstream.scale[n] * probability)
    return sloped(dz, columns.slope)
