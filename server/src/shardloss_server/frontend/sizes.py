"""The sizes of tables, and the refusal of a table that does not fit in the memory it would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shardloss.errors import LimitExceeded

from shardloss_server.config import Limits
from shardloss_server.machine import Pool
from shardloss_server.numerics.optimizer import OptimizerSpec, state_widths
from shardloss_server.placement import hosted_shards, num_hosts
from shardloss_server.shard.record import TableSpec

COUNT_BYTES = 24  # a count and up to two nodes of its tree
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
COPIES_BYTES = 32 * 2**20  # for the copies that filling, an import or a small step makes
FRONT_END = "the front end"


def table_bytes(spec: TableSpec) -> int:
    """Return the bytes of a whole table: rows, biases, optimizer state and label counts."""
    return spec.num_classes * (row_bytes(spec) + COUNT_BYTES * spec.count_labels)


def row_bytes(spec: TableSpec) -> int:
    """Return the bytes that a worker needs for one row, its bias and their optimizer state."""
    state_item = ITEM_BYTES[spec.compute_dtype]
    per_row = spec.dim * ITEM_BYTES[spec.dtype] + state_item
    per_row += state_elements(spec.optimizer, spec.dim) * state_item
    if spec.bias:
        per_row += state_elements(spec.optimizer, 1) * state_item
    return per_row


def state_elements(optimizer: OptimizerSpec, dim: int) -> int:
    """Return the number of elements of the optimizer state of one row."""
    return sum(state_widths(optimizer, dim).values())


def rows_of_workers(spec: TableSpec, num_workers: int) -> list[int]:
    """Return the number of rows of each worker that hosts shards of a table."""
    shards = spec.placement.num_shards
    hosted = (hosted_shards(worker, num_workers, shards) for worker in range(num_hosts(num_workers, shards)))
    return [sum(map(spec.placement.num_rows, each)) for each in hosted]


def needed_bytes(spec: TableSpec, num_workers: int) -> dict[str, int]:
    """Return the bytes that a table takes in each process, by its name in errors."""
    rows = rows_of_workers(spec, num_workers)
    needed = {f"worker {worker}": num_rows * row_bytes(spec) for worker, num_rows in enumerate(rows)}
    return needed | ({FRONT_END: spec.num_classes * COUNT_BYTES} if spec.count_labels else {})


def refuse_too_large(spec: TableSpec, existing: Sequence[TableSpec], limits: Limits) -> None:
    """Refuse a table that does not fit in max_table_bytes alongside the existing ones."""
    taken, needed = sum(map(table_bytes, existing)), table_bytes(spec)
    if taken + needed > limits.max_table_bytes:
        raise LimitExceeded(
            f"the table would take {needed} bytes with its optimizer state; {taken} of max_table_bytes = "
            f"{limits.max_table_bytes} are in use",
            field="spec.num_classes",
        )


def refuse_unfitting(
    spec: TableSpec, needed: Mapping[str, int], promised: Mapping[str, int], memory: Mapping[str, Sequence[Pool]]
) -> None:
    """Refuse a table that needs more memory than there is in any pool that its processes share.

    All three are by process: the bytes needed and promised, to tables that are still being filled, and its pools.
    """
    asked: Counter[str] = Counter()
    for process, pools in memory.items():
        for pool in pools:
            asked[pool.key] += needed.get(process, 0) + promised.get(process, 0)
    for process, num_bytes in needed.items():
        for pool in memory[process]:
            available = pool.free_bytes - COPIES_BYTES
            if asked[pool.key] > available:
                raise LimitExceeded(
                    f"table {spec.name!r} does not fit: {process} needs {num_bytes:,} bytes for its rows and optimizer "
                    f"state; of the {asked[pool.key]:,} bytes that must come from {pool.name}, of "
                    f"{pool.limit_bytes:,} bytes, {max(0, available):,} are available. Delete a table, use fewer "
                    "classes, a narrower dtype or an optimizer with less state, or add memory or workers",
                    field="spec.num_classes",
                    process=process,
                    needed_bytes=num_bytes,
                    available_bytes=max(0, available),
                )
