"""The creation of a table on its workers: they are asked for room, allocate the shards and fill them in slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from shardloss.errors import RowsLost, TableUnavailable

from shardloss_server.cluster.group import Pending, ShardGroup
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.owner import RETRY_AFTER_S, TableOwner
from shardloss_server.frontend.sizes import FRONT_END, needed_bytes, refuse_unfitting, rows_of_workers
from shardloss_server.machine import pools

SLICE_ELEMENTS = 1 << 21  # elements of rows that a worker fills at once: 40 ms on one core

T = TypeVar("T")


def create(owner: TableOwner, group: ShardGroup, earlier: Sequence[TableOwner], deadline: Deadline) -> None:
    """Allocate the shards of a table and fill them slice by slice; other calls take their turns between two slices.

    earlier are the tables whose creation began before and is not over: the memory that they still need is theirs.

    Raises:
        LimitExceeded: a worker, or the front end, has too little memory; nothing was allocated.
        TableUnavailable: a worker is away; repeat the call.
        RowsLost: a worker died while it filled its shards: it may have run out of memory, so it is not tried again.
        TableNotFound: the table was deleted meanwhile.
        DeadlineExceeded: the deadline passed, or the caller went away.
    """
    refuse_without_room(owner, group, earlier, deadline)
    spec = replace(owner.spec, name=owner.key)
    begun(owner, lambda: group.create(spec, owner.limits.max_sessions), deadline)
    num_rows = max(rows_of_workers(spec, len(group.devices)))
    num_pieces = max(1, num_rows * spec.dim // SLICE_ELEMENTS)
    try:
        for piece in range(num_pieces):
            owner.ask(partial(group.fill, owner.key, piece, num_pieces), deadline)
            owner.note_filled((piece + 1) / num_pieces)
    except (TableUnavailable, RowsLost) as error:
        raise RowsLost(
            f"a worker died while it filled table {owner.spec.name!r}, so the table was not created; see the log, and "
            "whether the worker has enough memory, before you create it again"
        ) from error


def refuse_without_room(
    owner: TableOwner, group: ShardGroup, earlier: Sequence[TableOwner], deadline: Deadline
) -> None:
    """Refuse a table that does not fit in the memory of its processes beside those whose creation began earlier."""
    num_workers, num_shards = len(group.devices), owner.spec.placement.num_shards
    needed, promised = needed_bytes(owner.spec, num_workers), Counter[str]()
    for other in earlier:
        left = 1.0 - other.filled
        promised.update({name: round(left * each) for name, each in needed_bytes(other.spec, num_workers).items()})
        num_shards = max(num_shards, other.spec.placement.num_shards)
    total = sum(needed.values()) + promised.total()
    found = begun(owner, lambda: group.memory(num_shards, total), deadline)
    memory = {f"worker {worker}": each for worker, each in enumerate(found)} | {FRONT_END: pools()}
    refuse_unfitting(owner.spec, needed, promised, memory)


def begun(owner: TableOwner, start: Callable[[], Pending[T]], deadline: Deadline) -> T:
    """Return the result of work that a worker can begin again after its death, because it held no rows yet.

    Raises:
        TableUnavailable: a worker has died.
    """
    try:
        return owner.ask(start, deadline)
    except RowsLost as error:
        raise TableUnavailable("a worker has died and is not back yet", retry_after_s=RETRY_AFTER_S) from error
