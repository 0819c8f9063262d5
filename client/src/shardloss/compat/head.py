"""The head through which all functions of shardloss.compat train a table."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor

from shardloss import types
from shardloss.autograd import fresh_seed
from shardloss.compat.arguments import named
from shardloss.heads import Head
from shardloss.optimizer import RemoteOptimizer, uncompiled
from shardloss.table import Table


class SharedHead(Head):
    """A head for all kinds of losses [N] over a table; losses of a step share its session and, per seed, candidates."""

    advice = "call optimizer(table, lr) first; ignore this if the table is to stay as it is"

    def __init__(self, table: Table) -> None:
        super().__init__(table, reduction="none", ignore_index=None, learning_rate=None)
        self.seed = fresh_seed()

    def ignoring(self, ignore_index: int | None) -> SharedHead:
        """Return this head with labels equal to ignore_index left out, or with every label counted for None."""
        twin = copy.copy(self)  # shares the session and its steps
        twin.ignore_index = ignore_index
        return twin


def head_of(table: Table) -> SharedHead:
    """Return the one head of a client for a table, whatever handle of it is given."""

    def retire(head: SharedHead) -> None:
        head.pending.retire(f"another table has the name {table.name!r} since this optimizer was created")

    return table.client._attach(__name__, table, lambda: SharedHead(table), retire)


@uncompiled
def losses_of(
    table: Table,
    hidden: Tensor,
    labels: Tensor,
    loss: types.Loss,
    names: Mapping[str, str],
    *,
    label_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Return the losses [...] of hidden [..., D] with labels [...] or [..., T], through the head of the table.

    Errors name the caller's arguments: names maps fields of the contract to them.
    """
    with named(names):
        return head_of(table).ignoring(ignore_index).apply_loss(hidden, labels, loss, label_weights)


def optimizer(table: Table, lr: float) -> RemoteOptimizer:
    """Return the torch optimizer of a table that shardloss.compat trains.

    step() commits the losses whose backward has run. Create only one for each client and table: a second one would
    commit the same step.
    """
    return head_of(table).optimizer(lr)
