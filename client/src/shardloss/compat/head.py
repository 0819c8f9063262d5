"""The head through which all functions of shardloss.compat train a table."""

from __future__ import annotations

from shardloss.autograd import fresh_seed
from shardloss.heads import Head
from shardloss.optimizer import RemoteOptimizer
from shardloss.table import Table

IGNORED = -(2**63)  # marks a label that does not count; no class id, and no plausible ignore_index


class SharedHead(Head):
    """A head for all kinds of losses [N] over a table; losses of a step share its session and, per seed, candidates."""

    advice = "call optimizer(table, lr) first; ignore this if the table is to stay as it is"

    def __init__(self, table: Table) -> None:
        super().__init__(table, reduction="none", ignore_index=IGNORED, learning_rate=None)
        self.seed = fresh_seed()


def head_of(table: Table) -> SharedHead:
    """Return the one head of a client for a table, whatever handle of it is given."""

    def retire(head: SharedHead) -> None:
        head.pending.retire(f"another table has the name {table.name!r} since this optimizer was created")

    return table.client._attach(__name__, table, lambda: SharedHead(table), retire)


def optimizer(table: Table, lr: float) -> RemoteOptimizer:
    """Return the torch optimizer of a table that shardloss.compat trains.

    step() commits the losses whose backward has run. Create only one for each client and table: a second one would
    commit the same step.
    """
    return head_of(table).optimizer(lr)
