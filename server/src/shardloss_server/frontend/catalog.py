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
from shardloss_server.frontend import creation
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.frontend.session import TicketBudget
from shardloss_server.frontend.sizes import refuse_too_large
from shardloss_server.frontend.turns import Turns
from shardloss_server.shard.record import TableSpec

MAX_DEVIATIONS = 8.0  # a normal number drawn from 32 bits is within 6.8 standard deviations
log = logging.getLogger(__name__)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
GONE = (
    "the table that was opened as {!r} was deleted, or the server was restarted; a table created since under that name "
    "is another one: open it with client.table, and create new sessions, heads and optimizers"
)


class Catalog:
    """The collection of a server's tables, which creates, finds, renames and deletes them. Thread-safe.

    `_naming` is held only while names are read and changed, never while a worker is waited for: a new table has its
    name from the start, is filled outside the lock, and until then only its creation can use it.
    """

    def __init__(self, group: ShardGroup, limits: Limits) -> None:
        self.group, self.limits = group, limits
        self.budget = TicketBudget(limits.max_open_tickets, limits.max_ticket_bytes)
        self.turns = Turns(limits.max_calls_at_workers)
        self._owners: dict[str, TableOwner] = {}
        self._retired: deque[TableOwner] = deque()  # their shards may not be freed yet
        self._naming = threading.Lock()

    def owner(self, table: str) -> TableOwner:
        """Return the owner of a table, given by its name or by its reference, which a renaming does not change.

        Raises:
            TableNotFound: no table has this name, or the table of this reference is gone.
            TableUnavailable: the table is still being created.
        """
        owner = self.find(table)
        owner.refuse_unfinished()
        return owner

    def find(self, table: str) -> TableOwner:
        """Return the owner of a table, even while it is being created.

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
        """Return the owners of all tables, also of those being created, ordered by name."""
        return [owner for _, owner in sorted(self._owners.copy().items())]

    def create(self, spec: TableSpec, deadline: Deadline) -> tuple[TableOwner, bool]:
        """Create a table, or find the one with an equal spec; return its owner, and True if the table is new.

        If another call is creating an equal table, wait for it. A creation that fails leaves nothing behind.

        Raises:
            TableExists: a table with this name exists, or is being created, with a different spec.
            InvalidArgument, LimitExceeded: the spec is invalid or too large.
            TableUnavailable: a worker is away, or the creation that this call waited for has failed.
            RowsLost: the existing table has lost rows, or a worker died while it filled the new one.
        """
        check_spec(spec, self.limits)
        with self._naming:
            owner = self._owners.get(spec.name)
            earlier = [other for other in self._owners.values() if not other.is_filled]
            if owner is None:
                self._refuse_more(spec)
                new = TableOwner(spec, self.group, self.limits, self.budget, self.turns, secrets.token_hex(8))
                self._owners[spec.name] = new
        if owner is not None:
            refuse_other(owner, spec)
            owner.wait_until_filled(deadline)
            return owner, False
        try:
            creation.create(new, self.group, earlier, deadline)
        except BaseException:
            self._remove(new)
            raise
        return new, True

    def _refuse_more(self, spec: TableSpec) -> None:
        """Refuse a table beyond max_tables or max_table_bytes."""
        if len(self._owners) >= self.limits.max_tables:
            raise LimitExceeded(f"max_tables = {self.limits.max_tables} tables exist; delete one", field="spec")
        refuse_too_large(spec, [owner.spec for owner in self._owners.values() if owner.lost is None], self.limits)

    def delete(self, table: str) -> None:
        """Delete a table and free its shards, even if it has lost rows or is still being created.

        Raises:
            TableNotFound: no table has this name.
        """
        self._remove(self.find(table))

    def rename(self, table: str, new_name: str, replace_existing: bool = False) -> TableOwner:
        """Rename a table; its shards keep their key. With replace_existing, delete the table that had the new name.

        Raises:
            TableNotFound: no table has the old name.
            TableExists: another table has the new name.
            TableUnavailable: the table is still being created.
            InvalidArgument: the new name is not valid.
        """
        check_name(new_name, "new_name")
        with self._naming:
            owner, other = self.owner(table), self._owners.get(new_name)
            old_name = owner.spec.name
            if other is not None and other is not owner and not replace_existing:
                raise TableExists(f"a table named {new_name!r} exists; delete it or use another name", field="new_name")
            owner.spec = replace(owner.spec, name=new_name)
            self._owners[new_name] = owner
            if new_name != old_name:
                del self._owners[old_name]
        if other is not None and other is not owner:
            self._retire(other)
        return owner

    def _remove(self, owner: TableOwner) -> None:
        """Take a table out of the catalog, unless that has been done, and free its shards."""
        with self._naming:
            if self._owners.get(owner.spec.name) is owner:
                del self._owners[owner.spec.name]
        self._retire(owner)

    def _retire(self, owner: TableOwner) -> None:
        owner.retire()
        self._retired.append(owner)

    def close(self) -> None:
        """End all waits for steps, because the server is stopping."""
        for owner in self.owners():
            owner.close()

    def settle(self, deadline: Deadline) -> None:
        """Settle tables in doubt, mark tables with lost rows, and free the remaining shards of deleted tables."""
        for _ in range(len(self._retired)):
            retired = self._retired.popleft()
            if not retired.is_freed():
                self._retired.append(retired)
        for owner in self.owners():
            owner.notice_loss()
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


def facts(spec: TableSpec) -> dict[str, object]:
    """Return the fields that must agree for two specs to describe one table, by the contract's field names."""
    fields = ("num_classes", "dim", "dtype", "bias", "initializer", "optimizer", "count_labels")
    cut = {"placement": spec.placement.strategy, "num_shards": spec.placement.num_shards}
    return {field: getattr(spec, field) for field in fields} | cut


def refuse_other(owner: TableOwner, asked: TableSpec) -> None:
    """Refuse a spec that differs from the existing table's; the error names the first difference."""
    have_all, want_all = facts(owner.spec), facts(asked)
    verb = "exists" if owner.is_filled else "is being created"
    for field, have in have_all.items():
        want = want_all[field]
        if have != want:
            raise TableExists(
                f"table {asked.name!r} {verb} with {field} = {have}, not {want}; delete it or use another name",
                field=f"spec.{field}",
            )
