"""Label distributions y [N, V], which come in pieces: what of them a shard answers, and what it keeps.

Of a piece remains its target, and where a step is to come the rows' gradient (g y)^T hidden: D numbers a class, never
N. The gradient does not depend on the table's version, so it stays right until the step is applied. See
docs/adr/0006.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics.partial import Target
from shardloss_server.shard import columns
from shardloss_server.shard.record import LabelTarget, Part
from shardloss_server.shard.rows import ShardRows


@dataclass(frozen=True, slots=True)
class Collected:
    """Sums of g y hidden [R, D] and g y [R] over the pieces of the named distribution."""

    name: str
    rows: Tensor
    biases: Tensor

    @staticmethod
    def nothing(name: str, rows: ShardRows) -> Collected:
        """Zeros for every row of a shard."""
        return Collected(name, torch.zeros_like(rows.weights, dtype=rows.compute_dtype), torch.zeros_like(rows.biases))


def owned_columns(rows: ShardRows, first_class: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Row index [M] and y [N, M] of the shard's classes among weights [N, C] of classes from first_class on."""
    class_ids = torch.arange(first_class, first_class + weights.shape[1])
    mine = rows.spec.placement.owned(rows.shard, class_ids)
    return rows.spec.placement.rows(rows.shard, class_ids[mine]), weights[:, mine].to(rows.compute_dtype)


def target_of(rows: ShardRows, part: Part, row_index: Tensor, weights: Tensor, version: int) -> LabelTarget:
    """Sums of y z and y row over a piece: weights y [N, M] of the rows at row_index [M]."""
    gathered, biases, _ = rows.gather(row_index, part.objective.transform)
    row = weights @ gathered
    hidden = columns.as_multiplied(rows, part, counted_hidden(part, weights))
    logit = (hidden.double() * row.double()).sum(1) + weights.double() @ biases.double()
    pull = logit if part.objective.learned_scale else None
    return LabelTarget(Target(logit, row, pull), weights.double().sum(1), version)


def collect_(collected: Collected, part: Part, row_index: Tensor, weights: Tensor, g: Tensor) -> None:
    """Add a piece's gradient to what is collected."""
    scaled = (weights * g[:, None]).T
    collected.rows[row_index] += scaled @ counted_hidden(part, weights)
    collected.biases[row_index] += scaled.sum(1)


def counted_hidden(part: Part, weights: Tensor) -> Tensor:
    """Hidden [N, D] with 0 in rows without a weight in weights [N, M]: what overflowed there would make 0 times inf."""
    return torch.where((weights != 0).any(1, keepdim=True), part.batch.hidden, 0.0)
