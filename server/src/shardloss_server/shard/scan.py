"""Exact questions over a slice of a shard's rows: log-sum-exp, rank of a label, best classes, asked logits.

Logits are formed in float64. Their last bits depend on where a row stands in the matrix, so for every comparison they
are rounded to a **key**: a multiple of 2^-24 (2^-33 in a float64 table) of |hidden| |row| or of |bias|, whichever is
larger, all taken up to the next power of two. Equal rows have equal keys on any shard and in any slice, and logits
with the same key count as tied. See docs/adr/0002.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.ranking import Best, best
from shardloss_server.shard.table import ShardTable

ASKED_ELEMENTS = 1 << 20  # elements of asked rows held at once
KEY_BITS = {torch.float32: 24, torch.float64: 33}


@dataclass(frozen=True, slots=True)
class Question:
    """What to answer for hidden [N, D].

    labels [N] (-1: no label) with label_keys [N] ask for the number of classes that stand before the label; k > 0 asks
    for the k best; with_lse for the log-sum-exp.
    """

    hidden: Tensor
    labels: Tensor | None
    label_keys: Tensor | None
    k: int
    with_lse: bool


@dataclass(frozen=True, slots=True)
class ScanAnswer:
    """The answers over one slice: lse [N] float64, num_before [N] and the best; None where not asked."""

    version: int
    lse: Tensor | None
    num_before: Tensor | None
    best: Best | None


@dataclass(frozen=True, slots=True)
class AskedLogits:
    """Logits and keys [N, S] float64 of asked classes: a shard's own, 0 for all others, so that shards sum up."""

    logits: Tensor
    keys: Tensor
    version: int


def power_above(values: Tensor) -> Tensor:
    """The power of two above each value's size, at most twice it; 0 for 0."""
    return torch.where(values == 0, 0.0, torch.exp2(torch.frexp(values).exponent.double()))


def norms(values: Tensor) -> Tensor:
    """|value| [M] of values [M, D], up to the next power of two; the same bits for equal rows.

    Scaled by each row's largest entry, so that its squares neither overflow nor vanish.
    """
    largest = power_above(values.abs().amax(1)) / 2
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None]
    return power_above(torch.linalg.vector_norm(scaled, dim=1)) * largest


def magic_of(hidden_norms: Tensor, rows: Tensor, biases: Tensor, dtype: torch.dtype) -> Tensor:
    """What added to a logit, and subtracted again, rounds it to its grid: 1.5 * 2^52 steps of 2^-bits * scale.

    The scale is the size of what the logit is the sum of: |hidden| |row| or |bias|, whichever is larger.
    """
    steps = 1.5 * 2.0 ** (52 - KEY_BITS[dtype])
    return torch.maximum((steps * hidden_norms) * norms(rows), steps * power_above(biases))


def log_sum_exp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-sum-exp [N] of float64 logits [N, R], its exponentials in dtype; -inf where R = 0."""
    if logits.shape[1] == 0:
        return torch.full((len(logits),), -torch.inf, dtype=torch.float64)
    top = logits.amax(1)
    return top + (logits - top[:, None]).to(dtype).exp_().sum(1).double().log()


def keys_of(logits: Tensor, magic: Tensor) -> Tensor:
    """Logits rounded to their grids."""
    return (logits + magic).sub_(magic)


def asked_logits(table: ShardTable, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
    """Logits and keys of class_ids [N, S] that this shard owns."""
    logits, keys = (torch.zeros(class_ids.shape, dtype=torch.float64) for _ in range(2))
    batch_row, column = torch.nonzero(table.spec.placement.owned(table.shard, class_ids), as_tuple=True)
    hidden = hidden.double()
    hidden_norms = norms(hidden)
    size = max(1, ASKED_ELEMENTS // table.spec.dim)
    for n, s in zip(torch.split(batch_row, size), torch.split(column, size), strict=True):
        index = table.spec.placement.rows(table.shard, class_ids[n, s])
        rows, biases = table.weights[index].double(), table.biases[index].double()
        values = (rows * hidden[n]).sum(1) + biases
        logits[n, s] = values
        keys[n, s] = keys_of(values, magic_of(hidden_norms[n], rows, biases, table.compute_dtype))
    return AskedLogits(logits, keys, table.version)


def answer(table: ShardTable, question: Question, piece: int, num_pieces: int) -> ScanAnswer:
    """Answer over the piece-th of num_pieces slices of the shard's rows."""
    start = table.num_rows * piece // num_pieces
    end = table.num_rows * (piece + 1) // num_pieces
    class_ids, rows, biases = table.dense_rows(start, end)
    rows, biases, hidden = rows.double(), biases.double(), question.hidden.double()
    logits = torch.addmm(biases, hidden, rows.T)
    lse = log_sum_exp(logits, table.compute_dtype) if question.with_lse else None
    num_before = found = None
    if question.k or question.labels is not None:
        keys = keys_of(logits, magic_of(norms(hidden)[:, None], rows, biases, table.compute_dtype))
        if not torch.isfinite(logits.sum()):  # nan comes first of all, so that whoever asked finds it and refuses it
            keys[keys.isnan()] = torch.inf
        if question.labels is not None and question.label_keys is not None:
            num_before = count_before(class_ids, keys, question.labels, question.label_keys)
        if question.k:
            found = best(class_ids, keys, logits, question.k)
    return ScanAnswer(table.version, lse, num_before, found)


def count_before(class_ids: Tensor, keys: Tensor, labels: Tensor, label_keys: Tensor) -> Tensor:
    """#{z > z_y} + #{z = z_y, id < y} [N] over one slice: class_ids [R], keys [N, R]."""
    z_y, y = label_keys[:, None], labels[:, None]
    before = (keys > z_y) | ((keys == z_y) & (class_ids < y))
    return (before & (class_ids != y)).sum(1)
