"""One shard of one table: its rows, their optimizer state and its version."""

from __future__ import annotations

from collections import deque
from itertools import chain, islice

import torch
from torch import Tensor

from shardloss_server.numerics.initializer import fill_rows_, round_stochastically
from shardloss_server.numerics.optimizer import State, fill_state_, new_state, update_
from shardloss_server.shard import columns, distribution
from shardloss_server.shard.distribution import Collected
from shardloss_server.shard.gradient import dense_gradient, in_blocks, touched_gradient
from shardloss_server.shard.kept import KEPT_BYTES, Kept, Room
from shardloss_server.shard.ledger import Ledger, Outcome
from shardloss_server.shard.record import (
    LabelTarget,
    Mined,
    Part,
    Record,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    TableSpec,
    Upstream,
    allocating,
)
from shardloss_server.shard.rows import Index, ShardRows, put_, taken

KEPT_RECORDS = 1  # shards lag by one record at most: the owner settles it before it starts another


class VersionGap(Exception):
    """A record or write that is not the next version; the shard lags and needs the missing ones first."""


class ShardTable(ShardRows):
    """The rows of one shard of a table and the operations that change them.

    A new shard is allocated, and `fill_` gives it its initial values. Optimizer state is in compute dtype. After that,
    only `apply_` and `write_` change rows or state, and only from version v to v + 1; repeating the current version is
    a no-op.
    """

    def __init__(self, spec: TableSpec, shard: int, max_sessions: int, room: Room | None = None) -> None:
        super().__init__(spec, shard)
        self.version = 0
        self.num_commits = 0
        self.ledger = Ledger(max_sessions)
        self.collected: Collected | None = None
        self.kept = Kept(room or Room(KEPT_BYTES))
        self._records: deque[Record | RowWrite] = deque(maxlen=KEPT_RECORDS)
        self.weight_state = new_state(spec.optimizer, self.num_rows, spec.dim, self.compute_dtype)
        self.bias_state = new_state(spec.optimizer, self.num_rows if spec.bias else 0, 1, self.compute_dtype)

    # Reading

    def score(self, part: Part, with_gradient: bool, keep: bool = False) -> Score:
        """Score a part over this shard's columns; statistics with D columns are computed only if with_gradient.

        If keep is True, a step is expected at this version, and results that it can reuse are kept.
        """
        return columns.score(self, part, with_gradient, self.version, self.kept if keep else None)

    def mine(self, part: Part, k: int) -> Mined:
        """Return the k best candidates of each row among this shard's, excluding accidental hits."""
        return columns.mine(self, part, k, self.version)

    def gradient(self, part: Part, upstream: Upstream) -> RowGradient:
        """Return the gradient of sum(g * loss) with respect to this shard's touched rows, class ids ascending.

        A full softmax touches all rows.
        """
        row_index, rows, biases = touched_gradient(self, (part,), (upstream,), self.kept)
        if part.is_full:
            touched = row_index, rows, biases
            chunks = list(dense_gradient(self, (part,), (upstream,), touched, self.collected, self.kept))
            row_index = torch.arange(self.num_rows)
            rows = torch.cat([chunk[1] for chunk in chunks]) if chunks else rows[:0]
            biases = torch.cat([chunk[2] for chunk in chunks]) if chunks else biases[:0]
        row_index, order = torch.sort(row_index)
        return RowGradient(self.class_ids(row_index), rows[order], biases[order])

    def begin_labels_(self, name: str) -> int:
        """Begin to collect the gradient of a label distribution, dropping any earlier one; return the version."""
        self.collected = None
        self.collected = Collected.nothing(name, self)
        return self.version

    def add_labels_(self, part: Part, first_class: int, weights: Tensor, g: Tensor | None) -> LabelTarget:
        """Return the target of a label distribution's piece, weights [N, C]; with g [N], also collect the gradient."""
        row_index, mine = distribution.owned_columns(self, first_class, weights)
        target = distribution.target_of(self, part, row_index, mine, self.version)
        if g is not None and self.collected is not None:
            distribution.collect_(self.collected, part, row_index, mine, g)
        return target

    def forget_labels_(self) -> int:
        """Free the collected gradient of a label distribution; return the version."""
        self.collected = None
        return self.version

    def read(self, class_ids: Tensor, with_state: bool = False) -> Rows:
        """Return this shard's rows among class_ids [M], in that order, with their ids; with_state adds their state."""
        mine = class_ids[self.spec.placement.owned(self.shard, class_ids)]
        index = self.spec.placement.rows(self.shard, mine)
        of_rows = {name: value[index] for name, value in self.weight_state.items() if with_state}
        of_biases = {name: value[index] for name, value in self.bias_state.items() if with_state and self.spec.bias}
        return Rows(mine, self.weights[index], self.biases[index], self.version, self.num_commits, of_rows, of_biases)

    def records_since(self, version: int) -> list[Record | RowWrite]:
        """Return the kept records above a version, ascending; a gap before the first means that older ones are gone."""
        return [record for record in self._records if record.version > version]

    def forget_record(self, version: int) -> int:
        """Free the record that created a version, because every shard has applied it; return the present version."""
        if self._records and self._records[-1].version == version:
            self._records.clear()
        return self.version

    # Changing

    def fill_(self, piece: int = 0, num_pieces: int = 1) -> int:
        """Overwrite one of num_pieces equal pieces of the rows and their state with the initial values."""
        first, end = (place * self.num_rows // num_pieces for place in (piece, piece + 1))
        fill_rows_(
            self.spec.initializer, self.spec.placement.class_ids(self.shard, first, end), self.weights[first:end]
        )
        self.biases[first:end] = 0
        for state in (self.weight_state, self.bias_state):
            fill_state_(self.spec.optimizer, state, first, end)
        return self.version

    def apply_(self, record: Record) -> int:
        """Apply one optimizer step and return the version; a record of the current version is already applied.

        Raises:
            VersionGap: the record is not the next one.
        """
        if not self._is_next(record.version):
            return self.version
        step = self.num_commits + 1
        with allocating("the gradient of a step"):  # nothing changes before its first block is computed
            touched = touched_gradient(self, record.parts, record.upstreams, self.kept)
            if any(part.is_full for part in record.parts):
                blocks = dense_gradient(self, record.parts, record.upstreams, touched, self.collected, self.kept)
            else:
                blocks = in_blocks(touched)
            first = list(islice(blocks, 1))
        for index, rows, biases in chain(first, blocks):
            self._update_rows_(index, rows, biases, record, step)
        if any(part.distribution for part in record.parts):
            self.forget_labels_()
        self.num_commits = step
        self.ledger.note(record.key, Outcome(record.key.digest, record.version, record.staleness))
        self._advance_(record)
        return self.version

    def write_(self, write: RowWrite) -> int:
        """Overwrite rows, and their state as far as it is given, as one version; return the version.

        Raises:
            VersionGap: the write is not the next version.
        """
        if not self._is_next(write.version):
            return self.version
        mine = self.spec.placement.owned(self.shard, write.class_ids)
        index = self.spec.placement.rows(self.shard, write.class_ids[mine])
        self.weights[index] = write.rows[mine].to(self.weights.dtype)
        if write.biases is not None:
            self.biases[index] = write.biases[mine].to(self.compute_dtype)
        for state, new in ((self.weight_state, write.weight_state), (self.bias_state, write.bias_state)):
            for name, values in new.items():
                state[name][index] = values[mine].to(self.compute_dtype)
        if write.num_commits is not None:
            self.num_commits = write.num_commits
        self._advance_(write)
        return self.version

    def _is_next(self, version: int) -> bool:
        if version == self.version + 1:
            return True
        if version == self.version:
            return False
        raise VersionGap(f"shard {self.shard} is at version {self.version}, but the record is for version {version}")

    def _advance_(self, record: Record | RowWrite) -> None:
        self.version = record.version
        self.kept.clear()
        self._records.append(record)

    def _update_rows_(self, index: Index, gradient: Tensor, bias_gradient: Tensor, record: Record, step: int) -> None:
        optimizer, lr = self.spec.optimizer, record.learning_rate
        rows = taken(self.weights, index).to(self.compute_dtype)
        state = {name: taken(value, index) for name, value in self.weight_state.items()}
        update_(optimizer, rows, gradient, state, lr, step)
        put_(self.weights, index, self._stored(rows, index, step))
        put_all_(self.weight_state, index, state)
        if self.spec.bias:
            biases = taken(self.biases, index)
            state = {name: taken(value, index) for name, value in self.bias_state.items()}
            update_(optimizer, biases[:, None], bias_gradient[:, None], state, lr, step)
            put_(self.biases, index, biases)
            put_all_(self.bias_state, index, state)

    def _stored(self, rows: Tensor, index: Index, step: int) -> Tensor:
        """Return rows in storage dtype.

        The rounding noise is keyed by the step, which, unlike the version, is preserved when a table is imported.
        """
        if self.weights.dtype != torch.bfloat16:
            return rows
        return round_stochastically(rows, self.spec.initializer.seed, step, self.class_ids(index))


def put_all_(state: State, index: Index, new: State) -> None:
    """Call `put_` for every entry of a state."""
    for name, value in new.items():
        put_(state[name], index, value)
