"""The one head through which the functions of shardloss.compat train a table."""

from __future__ import annotations

from shardloss.autograd import fresh_seed
from shardloss.heads import Head
from shardloss.optimizer import RemoteOptimizer
from shardloss.table import Table

IGNORED = -(2**63)  # marks a label that does not count: no class, and no ignore_index that anybody uses


class SharedHead(Head):
    """Losses [N] of every kind over one table: those of a step share its session, and by seed its candidates."""

    def __init__(self, table: Table) -> None:
        super().__init__(table, reduction="none", ignore_index=IGNORED, learning_rate=None)
        self.seed = fresh_seed()


def head_of(table: Table) -> SharedHead:
    """The head of a client and table, found by the table's name."""

    def make() -> SharedHead:
        return SharedHead(table)

    def fits(head: SharedHead) -> bool:
        if shape_of(head.table) == shape_of(table):
            return True
        head.pending.retire(f"table {table.name!r} was made anew with another shape")
        return False

    return table.client.attached(__name__, table.name, make, fits)


def shape_of(table: Table) -> tuple[int, int, str, bool]:
    """What tells a table from another one made anew under its name."""
    spec = table.spec
    return spec.num_classes, spec.dim, spec.dtype, spec.bias


def optimizer(table: Table, lr: float) -> RemoteOptimizer:
    """The torch optimizer of a table that shardloss.compat trains: step() commits the losses whose backward has run.

    One for each client and table: a second one would commit the same step.
    """
    return head_of(table).optimizer(lr)
