"""What a shard computes: scores of its candidates, and the gradient of its rows.

All functions take the shard's rows in compute dtype and the part of a batch; class ids are already turned into rows of
the shard. `shard_` marks values of this shard alone. Nothing of size N x V is held: the full softmax goes through the
rows in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.correction import find_hits
from shardloss_server.numerics.partial import Partial, Target

CHUNK_LOGITS = 1 << 20  # logits held at once by the full softmax: 4 MiB of float32 stay near the cache
SAMPLED_LOGITS = 1 << 25  # and by a sampled loss, whose usual N x S fits; a larger one goes in ranges of candidates


@dataclass(frozen=True, slots=True)
class LabelColumns:
    """The true columns of a batch that a shard owns, flattened to L entries.

    batch_row [L] and column [L] say where in labels [N, T] an entry stands; row_index [L] its row in the shard;
    weight [L] = y; log_weight [L] = -log Q, or None in the full softmax.
    """

    batch_row: Tensor
    column: Tensor
    row_index: Tensor
    weight: Tensor
    log_weight: Tensor | None


@dataclass(frozen=True, slots=True)
class CandidateColumns:
    """Gathered candidates of a shard: class_ids [C] ascending, rows [C, D], offset [C] = bias + log weight.

    after_hit [C] is what offset becomes in a row where the candidate is an accidental hit; None where hits are kept.
    """

    class_ids: Tensor
    rows: Tensor
    offset: Tensor
    after_hit: Tensor | None


def softmax_statistics(logits: Tensor, rows: Tensor, with_mean_row: bool) -> Partial:
    """Partial of one dense block: logits [N, C] (overwritten), rows [C, D]. C may be 0; a row may be all -inf."""
    if logits.shape[1] == 0:
        return Partial.empty(logits.shape[0], rows.shape[1], logits.dtype, with_mean_row)
    top = logits.amax(1)
    safe_top = torch.where(torch.isneginf(top), 0.0, top)
    exps = logits.sub_(safe_top[:, None]).exp_()
    total = exps.sum(1)
    lse = safe_top.double() + total.double().log()
    if not with_mean_row:
        return Partial(lse, None)
    return Partial(lse, (exps @ rows) / torch.where(total == 0, 1.0, total)[:, None])


def candidate_ranges(columns: CandidateColumns, num_rows: int) -> Iterator[CandidateColumns]:
    """The candidates in ranges whose logits against num_rows of hidden stay within SAMPLED_LOGITS; usually one."""
    size = max(64, SAMPLED_LOGITS // max(1, num_rows))
    if len(columns.class_ids) <= size:
        yield columns
        return
    for start in range(0, len(columns.class_ids), size):
        cut = slice(start, start + size)
        after_hit = None if columns.after_hit is None else columns.after_hit[cut]
        yield CandidateColumns(columns.class_ids[cut], columns.rows[cut], columns.offset[cut], after_hit)


def candidate_logits(hidden: Tensor, labels: Tensor, columns: CandidateColumns) -> Tensor:
    """Corrected logits [N, C] = h . row + bias - log Q, with accidental hits removed."""
    logits = torch.addmm(columns.offset, hidden, columns.rows.T)
    if columns.after_hit is None:
        return logits
    batch_row, place = find_hits(columns.class_ids, labels)
    if len(place):
        corrected = logits[batch_row, place] - columns.offset[place] + columns.after_hit[place]
        logits[batch_row, place] = corrected
    return logits


def label_logits(hidden: Tensor, columns: LabelColumns, label_rows: Tensor, label_biases: Tensor) -> Tensor:
    """Logits [L] of the owned true columns, corrected where the loss is sampled. label_rows [L, D]."""
    logits = (hidden[columns.batch_row] * label_rows).sum(1) + label_biases
    return logits if columns.log_weight is None else logits + columns.log_weight


def target_of(
    batch: int, dim: int, columns: LabelColumns, logits: Tensor, label_rows: Tensor, with_target_row: bool
) -> Target:
    """Sums of y z [N] and y row [N, D] over the owned true columns."""
    weighted = torch.where(columns.weight == 0, 0.0, columns.weight.double() * logits.double())
    target_logit = torch.zeros(batch, dtype=torch.float64).index_add_(0, columns.batch_row, weighted)
    if not with_target_row:
        return Target(target_logit, None)
    target_row = torch.zeros(batch, dim, dtype=logits.dtype)
    target_row.index_add_(0, columns.batch_row, columns.weight[:, None] * label_rows)
    return Target(target_logit, target_row)


def label_partial(
    hidden: Tensor, num_true: int, columns: LabelColumns, logits: Tensor, label_rows: Tensor, with_mean_row: bool
) -> Partial:
    """Partial of the true columns alone: each owned label is one column of its own row."""
    table = torch.full((len(hidden), num_true), -torch.inf, dtype=torch.float64)
    table[columns.batch_row, columns.column] = logits.double()
    lse = torch.logsumexp(table, 1)
    if not with_mean_row:
        return Partial(lse, None)
    weight = torch.exp(logits.double() - lse[columns.batch_row]).to(logits.dtype)
    mean_row = torch.zeros_like(hidden).index_add_(0, columns.batch_row, weight[:, None] * label_rows)
    return Partial(lse, mean_row)


def full_partial(hidden: Tensor, rows: Tensor, biases: Tensor, with_mean_row: bool) -> Partial:
    """Partial over one chunk of rows [R, D] with biases [R]."""
    return softmax_statistics(torch.addmm(biases, hidden, rows.T), rows, with_mean_row)


def finite_lse(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf: a row without a column has exp(-inf - 0) = 0 everywhere, never nan."""
    return torch.where(torch.isneginf(lse), 0.0, lse)


def logit_gradient(logits: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """dz = scale * exp(z - lse) [N, C], in place of logits. lse [N] float64, scale [N] = g * mass.

    lse is split into what the logits' dtype holds and a rest that goes into the scale, so its rounding costs nothing.
    """
    lse = finite_lse(lse)
    held = lse.to(logits.dtype)
    scale = scale * torch.exp(held.double() - lse).to(scale.dtype)
    return logits.sub_(held[:, None]).exp_().mul_(scale[:, None])


def label_logit_gradient(columns: LabelColumns, logits: Tensor, lse: Tensor, g: Tensor, mass: Tensor) -> Tensor:
    """dz [L] of the true columns: g (mass p - y) where they are columns of the softmax, -g y in the full softmax."""
    n = columns.batch_row
    if columns.log_weight is None:
        return -g[n] * columns.weight
    probability = torch.exp(logits.double() - finite_lse(lse)[n]).to(logits.dtype)
    return g[n] * (mass[n] * probability - columns.weight)
