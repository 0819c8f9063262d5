"""Exact questions over a slice of a shard's rows: log-sum-exp, rank of a label, best classes, asked logits.

Logits are formed in float64 and then rounded (to float32, or to 33 significant bits in a float64 table), so that equal
rows give equal logits on any shard and in any slice (the bits of a plain float32 product depend on where a row stands);
only then are they compared. Two logits that round to the same number count as tied. See docs/adr/0002.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.shard.table import ShardTable

SPLITTER = 2.0**20 + 1.0  # keeps 53 - 20 = 33 bits


@dataclass(frozen=True, slots=True)
class Question:
    """What to answer for hidden [N, D].

    labels [N] (-1: no label) with label_logits [N] ask for the number of classes that stand before the label; k > 0
    asks for the k best; with_lse for the log-sum-exp.
    """

    hidden: Tensor
    labels: Tensor | None
    label_logits: Tensor | None
    k: int
    with_lse: bool


@dataclass(frozen=True, slots=True)
class ScanAnswer:
    """The answers over one slice: lse [N], num_before [N], best_ids and best_logits [N, <= k]; None where not asked."""

    version: int
    lse: Tensor | None
    num_before: Tensor | None
    best_ids: Tensor | None
    best_logits: Tensor | None


def rounded(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 logits rounded to float32, or to 33 significant bits of float64 (Veltkamp splitting, Dekker 1971)."""
    if dtype == torch.float32:
        return logits.float()
    scaled = logits * SPLITTER
    return scaled - (scaled - logits)


def asked_logits(table: ShardTable, hidden: Tensor, class_ids: Tensor) -> Tensor:
    """Logits [N, S] in compute dtype of class_ids [N, S] that this shard owns; 0 for others, so that shards sum up."""
    logits = torch.zeros(class_ids.shape, dtype=table.compute_dtype)
    row, column = torch.nonzero(table.spec.placement.owned(table.shard, class_ids), as_tuple=True)
    index = table.spec.placement.rows(table.shard, class_ids[row, column])
    products = table.weights[index].double() * hidden[row].double()
    values = products.sum(1) + table.biases[index].double()
    logits[row, column] = rounded(values, table.compute_dtype)
    return logits


def answer(table: ShardTable, question: Question, piece: int, num_pieces: int) -> ScanAnswer:
    """Answer over the piece-th of num_pieces slices of the shard's rows."""
    start = table.num_rows * piece // num_pieces
    end = table.num_rows * (piece + 1) // num_pieces
    class_ids, rows, biases = table.dense_rows(start, end)
    logits = torch.addmm(biases.double(), question.hidden.double(), rows.double().T)
    logits = rounded(logits, table.compute_dtype)
    num_before = best_ids = best_logits = None
    if question.labels is not None and question.label_logits is not None:
        num_before = count_before(class_ids, logits, question.labels, question.label_logits)
    if question.k:
        best_ids, best_logits = best(class_ids, logits, question.k)
    lse = torch.logsumexp(logits, 1).double() if question.with_lse else None
    return ScanAnswer(table.version, lse, num_before, best_ids, best_logits)


def count_before(class_ids: Tensor, logits: Tensor, labels: Tensor, label_logits: Tensor) -> Tensor:
    """#{z > z_y} + #{z = z_y, id < y} [N] over one slice: class_ids [R], logits [N, R]."""
    z_y, y = label_logits[:, None], labels[:, None]
    before = (logits > z_y) | ((logits == z_y) & (class_ids < y))
    return (before & (class_ids != y)).sum(1)


def best(class_ids: Tensor, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, R) best of class_ids [R] (ascending) by logits [N, R]: logit descending, then id ascending."""
    k = min(k, len(class_ids))
    if k == 0:
        return class_ids.new_zeros(len(logits), 0), logits[:, :0]
    border = torch.topk(logits, k, dim=1).values[:, -1:]
    above, tied = logits > border, logits == border
    room = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= room))
    column = torch.nonzero(chosen)[:, 1].view(len(logits), k)
    return ordered(class_ids[column], logits.gather(1, column), k)


def ordered(class_ids: Tensor, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of [N, M] candidates by logit descending, then id ascending."""
    by_id = torch.argsort(class_ids, dim=1)
    class_ids, logits = class_ids.gather(1, by_id), logits.gather(1, by_id)
    by_logit = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :k]
    return class_ids.gather(1, by_logit), logits.gather(1, by_logit)
