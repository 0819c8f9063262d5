"""The catalog: the tables of a server by name."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections import deque
from dataclasses import replace

import torch
from shardloss.errors import InvalidArgument, LimitExceeded, TableExists, TableNotFound

from shardloss_server.cluster.group import ShardGroup
from shardloss_server.config import Limits
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.session import TicketBudget
from shardloss_server.frontend.turns import Turns
from shardloss_server.numerics.optimizer import OptimizerSpec, state_widths
from shardloss_server.shard.record import TableSpec

MAX_DEVIATIONS = 8.0  # a normal number drawn from 32 bits is within 6.8 standard deviations
log = logging.getLogger(__name__)
COUNT_BYTES = 24  # a count and up to two nodes of its tree
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
GONE = (
    "the table that was opened as {!r} was deleted, or the server was restarted; a table created since under that name "
    "is another one: open it with client.table, and create new sessions, heads and optimizers"
)
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class Catalog:
    """The collection of a server's tables, which creates, finds, renames and deletes them. Thread-safe."""

    def __init__(self, group: ShardGroup, limits: Limits) -> None:
        self.group, self.limits = group, limits
        self.budget = TicketBudget(limits.max_open_tickets, limits.max_ticket_bytes)
        self.turns = Turns(limits.max_calls_at_workers)
        self._owners: dict[str, TableOwner] = {}
        self._retired: deque[TableOwner] = deque()  # their shards may not be freed yet
        self._making = threading.Lock()

    def owner(self, table: str) -> TableOwner:
        """Return the owner of a table, given by its name or by its reference, which a renaming does not change.

        Raises:
            TableNotFound: no table has this name, or the table of this reference is gone.
        """
        name, mark, table_id = table.partition("#")
        owner = self._owners.get(name)
        if mark and (owner is None or owner.table_id != table_id):
            owner = next((other for other in self.owners() if other.table_id == table_id), None)
        if owner is None:
            raise TableNotFound(
                GONE.format(name) if mark else f"no table is named {name!r}; create it first", field="table"
            )
        return owner

    @property
    def num_sessions(self) -> int:
        """Number of sessions that all tables remember."""
        return sum(owner.sessions.num_known for owner in self.owners())

    def owners(self) -> list[TableOwner]:
        """Return the owners of all tables, ordered by name."""
        return [owner for _, owner in sorted(self._owners.copy().items())]

    def create(self, spec: TableSpec, deadline: Deadline) -> tuple[TableOwner, bool]:
        """Create a table, or find the one with an equal spec; return its owner, and True if the table is new.

        Raises:
            TableExists: a table with this name has a different spec.
            InvalidArgument, LimitExceeded: the spec is invalid or too large.
        """
        check_spec(spec, self.limits)
        with deadline.holding(self._making, "another creation, renaming or deletion of a table"):
            existing = self._owners.get(spec.name)
            if existing is not None:
                refuse_other(existing.spec, spec)
                return existing, False
            if len(self._owners) >= self.limits.max_tables:
                raise LimitExceeded(f"max_tables = {self.limits.max_tables} tables exist; delete one", field="spec")
            refuse_too_large(spec, [owner.spec for owner in self.owners()], self.limits)
            owner = TableOwner(spec, self.group, self.limits, self.budget, self.turns, secrets.token_hex(8))
            try:
                owner.create(deadline)
            except BaseException:
                self._retire(owner)
                raise
            self._owners[spec.name] = owner
            return owner, True

    def delete(self, table: str, deadline: Deadline) -> None:
        """Delete a table and free its shards, even if it has lost rows.

        Raises:
            TableNotFound: no table has this name.
        """
        with deadline.holding(self._making, "another creation, renaming or deletion of a table"):
            owner = self.owner(table)
            del self._owners[owner.spec.name]
            self._retire(owner)

    def rename(self, table: str, new_name: str, deadline: Deadline) -> TableOwner:
        """Rename a table; its shards keep their key.

        Raises:
            TableNotFound: no table has the old name.
            TableExists: another table has the new name.
            InvalidArgument: the new name is not valid.
        """
        check_name(new_name, "new_name")
        with deadline.holding(self._making, "another creation, renaming or deletion of a table"):
            owner = self.owner(table)
            old_name = owner.spec.name
            if new_name in self._owners and new_name != old_name:
                raise TableExists(f"a table named {new_name!r} exists; delete it or use another name", field="new_name")
            owner.spec = replace(owner.spec, name=new_name)
            self._owners[new_name] = owner
            if new_name != old_name:
                del self._owners[old_name]
            return owner

    def _retire(self, owner: TableOwner) -> None:
        owner.retire()
        self._retired.append(owner)

    def close(self) -> None:
        """End all waits for steps, because the server is stopping."""
        for owner in self.owners():
            owner.close()

    def settle(self, deadline: Deadline) -> None:
        """Settle tables whose last change is still in doubt, and free the remaining shards of deleted tables."""
        for _ in range(len(self._retired)):
            retired = self._retired.popleft()
            if not retired.is_freed():
                self._retired.append(retired)
        for owner in self.owners():
            owner.settle_if_idle(deadline)

    def expire_tickets(self, now: float) -> int:
        """Expire idle tickets of all tables, and return how many."""
        return sum(owner.sessions.expire(now) for owner in self.owners())


def check_name(name: str, field: str) -> None:
    """Check a table's name.

    Raises:
        InvalidArgument: the name is not valid; the error names the field.
    """
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"name {name[:40]!r} must match [a-z0-9][a-z0-9._-]* and have at most 128 characters", field=field
        )


def check_spec(spec: TableSpec, limits: Limits) -> None:
    """Check a table's name and sizes.

    Raises:
        InvalidArgument, LimitExceeded: the spec is invalid or too large; the error names the field.
    """
    check_name(spec.name, "spec.name")
    for field, value, most in (
        ("num_classes", spec.num_classes, limits.max_num_classes),
        ("dim", spec.dim, limits.max_dim),
        ("num_shards", spec.placement.num_shards, limits.max_num_shards),
    ):
        if value < 1:
            raise InvalidArgument(f"{field} = {value} must be at least 1", field=f"spec.{field}")
        if value > most:
            raise LimitExceeded(f"{field} = {value} exceeds {most}", field=f"spec.{field}")
    most_scale = torch.finfo(getattr(torch, spec.dtype)).max / MAX_DEVIATIONS
    if spec.initializer.scale > most_scale:
        name = "normal.stddev" if spec.initializer.kind == "normal" else "uniform.limit"
        raise InvalidArgument(
            f"initializer.{name} = {spec.initializer.scale} overflows {spec.dtype}", field=f"spec.initializer.{name}"
        )


def refuse_too_large(spec: TableSpec, existing: list[TableSpec], limits: Limits) -> None:
    """Refuse a table that does not fit in max_table_bytes alongside the existing ones."""
    taken, needed = sum(map(table_bytes, existing)), table_bytes(spec)
    if taken + needed > limits.max_table_bytes:
        raise LimitExceeded(
            f"the table would take {needed} bytes with its optimizer state; {taken} of max_table_bytes = "
            f"{limits.max_table_bytes} are in use",
            field="spec.num_classes",
        )


def table_bytes(spec: TableSpec) -> int:
    """Return the bytes of a whole table: rows, biases, optimizer state and label counts."""
    state_item = ITEM_BYTES[spec.compute_dtype]
    per_row = spec.dim * ITEM_BYTES[spec.dtype] + state_item
    per_row += state_elements(spec.optimizer, spec.dim) * state_item
    if spec.bias:
        per_row += state_elements(spec.optimizer, 1) * state_item
    if spec.count_labels:
        per_row += COUNT_BYTES
    return spec.num_classes * per_row


def state_elements(optimizer: OptimizerSpec, dim: int) -> int:
    """Return the number of elements of the optimizer state of one row."""
    return sum(state_widths(optimizer, dim).values())


def facts(spec: TableSpec) -> dict[str, object]:
    """Return the fields that must agree for two specs to describe one table, by the contract's field names."""
    fields = ("num_classes", "dim", "dtype", "bias", "initializer", "optimizer", "count_labels")
    cut = {"placement": spec.placement.strategy, "num_shards": spec.placement.num_shards}
    return {field: getattr(spec, field) for field in fields} | cut


def refuse_other(existing: TableSpec, asked: TableSpec) -> None:
    """Refuse a spec that differs from the existing table's; the error names the first difference."""
    have_all, want_all = facts(existing), facts(asked)
    for field, have in have_all.items():
        want = want_all[field]
        if have != want:
            raise TableExists(
                f"table {existing.name!r} exists with {field} = {have}, not {want}; delete it or use another name",
                field=f"spec.{field}",
            )
