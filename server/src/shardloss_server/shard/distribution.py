"""Label distributions y [N, V], which arrive in pieces: the shard's answer to each piece, and what it keeps.

A shard returns the target of each piece. If a step will follow, it also accumulates the rows' gradient
(g y)^T hidden, which has D numbers per class, whatever N is. The gradient does not depend on the table's version, so
it stays valid until the step is applied. See docs/adr/0006.
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
        """Return zeros for every row of a shard."""
        return Collected(name, torch.zeros_like(rows.weights, dtype=rows.compute_dtype), torch.zeros_like(rows.biases))


def owned_columns(rows: ShardRows, first_class: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row index [M] and y [N, M] of the shard's classes.

    weights [N, C] belong to consecutive classes that begin at first_class.
    """
    class_ids = torch.arange(first_class, first_class + weights.shape[1])
    mine = rows.spec.placement.owned(rows.shard, class_ids)
    return rows.spec.placement.rows(rows.shard, class_ids[mine]), weights[:, mine].to(rows.compute_dtype)


def target_of(rows: ShardRows, part: Part, row_index: Tensor, weights: Tensor, version: int) -> LabelTarget:
    """Return the sums of y z and y row over a piece with weights y [N, M] of the rows at row_index [M]."""
    gathered, biases, _ = rows.gather(row_index, part.objective.transform)
    row = weights @ gathered
    hidden = columns.as_multiplied(rows, part, counted_hidden(part, weights))
    logit = (hidden.double() * row.double()).sum(1) + weights.double() @ biases.double()
    pull = logit if part.objective.learned_scale else None
    return LabelTarget(Target(logit, row, pull), weights.double().sum(1), version)


def collect_(collected: Collected, part: Part, row_index: Tensor, weights: Tensor, g: Tensor) -> None:
    """Add a piece's gradient to the collected sums."""
    scaled = (weights * g[:, None]).T
    collected.rows[row_index] += scaled @ counted_hidden(part, weights)
    collected.biases[row_index] += scaled.sum(1)


def counted_hidden(part: Part, weights: Tensor) -> Tensor:
    """Return hidden [N, D] with 0 in rows whose weights [N, M] are all 0; an overflow there would give 0 * inf."""
    return torch.where((weights != 0).any(1, keepdim=True), part.batch.hidden, 0.0)
