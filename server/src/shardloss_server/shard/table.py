"""One shard of one table: its rows, their optimizer state and its version."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from shardloss_server.numerics import kernel
from shardloss_server.numerics.initializer import fill_rows_, round_stochastically
from shardloss_server.numerics.optimizer import State, initial_state, updated
from shardloss_server.numerics.partial import Partial, merge
from shardloss_server.shard.ledger import Ledger, Outcome
from shardloss_server.shard.record import (
    Candidates,
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

KEPT_RECORDS = 1  # a peer lags by the one record in flight: the owner settles it before it starts another
UPDATE_ROWS = 1 << 14  # rows an optimizer step takes at once, so that its temporaries stay small


Index = Tensor | slice  # rows of a shard: sparse, or one contiguous range


class VersionGap(Exception):
    """A record or write that is not the next version: the shard lags and must be given what it lacks first."""


class ShardTable:
    """The rows of shard k of a table and everything that may change them.

    Weights [R, D] are in storage dtype, biases [R] and optimizer state in compute dtype. Only `apply_` and `write_`
    change anything, and only from version v to v + 1; a repeat of the present version is a no-op.
    """

    def __init__(self, spec: TableSpec, shard: int, max_sessions: int) -> None:
        self.spec, self.shard = spec, shard
        self.version = 0
        self.num_commits = 0
        self.ledger = Ledger(max_sessions)
        self._records: deque[Record | RowWrite] = deque(maxlen=KEPT_RECORDS)
        self.num_rows = spec.placement.num_rows(shard)
        self.compute_dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self.weights = torch.empty(self.num_rows, spec.dim, dtype=getattr(torch, spec.dtype))
        self.biases = torch.zeros(self.num_rows, dtype=self.compute_dtype)
        self._fill_initial_()
        self.weight_state = initial_state(spec.optimizer, self.num_rows, spec.dim, self.compute_dtype)
        self.bias_state = initial_state(spec.optimizer, self.num_rows if spec.bias else 0, 1, self.compute_dtype)

    def _fill_initial_(self) -> None:
        for start in range(0, self.num_rows, UPDATE_ROWS):
            end = min(start + UPDATE_ROWS, self.num_rows)
            class_ids = self.spec.placement.class_ids(self.shard, start, end)
            fill_rows_(self.spec.initializer, class_ids, self.weights[start:end])

    # Reading

    def score(self, part: Part, with_gradient: bool) -> Score:
        """Partial and target of a part over this shard's candidates; mean rows only where a gradient is wanted."""
        labels = self._label_columns(part)
        label_rows, label_biases = self._gather(labels.row_index)
        logits = kernel.label_logits(part.batch.hidden, labels, label_rows, label_biases)
        num_rows, num_true = part.batch.labels.shape
        target = kernel.target_of(num_rows, self.spec.dim, labels, logits, label_rows, with_gradient)
        if part.candidates is None:
            return Score(self._full_partial(part.batch.hidden, with_gradient), target, self.version)
        partial = kernel.label_partial(part.batch.hidden, num_true, labels, logits, label_rows, with_gradient)
        for columns in kernel.candidate_ranges(self._candidate_columns(part.candidates), num_rows):
            candidate_logits = kernel.candidate_logits(part.batch.hidden, part.batch.labels, columns)
            partial = merge(kernel.softmax_statistics(candidate_logits, columns.rows, with_gradient), partial)
        return Score(partial, target, self.version)

    def gradient(self, part: Part, upstream: Upstream) -> RowGradient:
        """Gradient of sum(g * loss) in this shard's touched rows, class ids ascending; all rows for a full softmax."""
        row_index, rows, biases = self._touched_gradient((part,), (upstream,))
        if part.candidates is None:
            chunks = list(self._dense_gradient((part,), (upstream,), (row_index, rows, biases)))
            row_index = torch.arange(self.num_rows)
            rows = torch.cat([chunk[1] for chunk in chunks]) if chunks else rows[:0]
            biases = torch.cat([chunk[2] for chunk in chunks]) if chunks else biases[:0]
        placement = self.spec.placement
        class_ids = placement.first_class(self.shard) + row_index * placement.stride()
        return RowGradient(class_ids, rows, biases)

    def read(self, class_ids: Tensor) -> Rows:
        """This shard's rows among class_ids [M], in that order, with their ids."""
        mine = class_ids[self.spec.placement.owned(self.shard, class_ids)]
        index = self.spec.placement.rows(self.shard, mine)
        return Rows(mine, self.weights[index], self.biases[index], self.version)

    def dense_rows(self, first_row: int, end_row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids [R], rows [R, D] and biases [R] of a range of rows, in compute dtype."""
        class_ids = self.spec.placement.class_ids(self.shard, first_row, end_row)
        rows = self.weights[first_row:end_row].to(self.compute_dtype)
        return class_ids, rows, self.biases[first_row:end_row]

    def records_since(self, version: int) -> list[Record | RowWrite]:
        """The kept records above a version, ascending; a gap before the first means that older ones are gone."""
        return [record for record in self._records if record.version > version]

    # Changing

    def apply_(self, record: Record) -> int:
        """Apply one optimizer step and return the version; a record of the present version was applied already.

        Raises:
            VersionGap: the record is not the next one.
        """
        if not self._is_next(record.version):
            return self.version
        step = self.num_commits + 1
        with allocating("the gradient of a step"):  # nothing has changed until its first block is there
            touched = self._touched_gradient(record.parts, record.upstreams)
            if any(part.candidates is None for part in record.parts):
                blocks = self._dense_gradient(record.parts, record.upstreams, touched)
            else:
                blocks = in_blocks(touched)
            first = list(islice(blocks, 1))
        for index, rows, biases in chain(first, blocks):
            self._update_rows_(index, rows, biases, record, step)
        self.num_commits = step
        self.ledger.note(record.key, Outcome(record.key.digest, record.version, record.staleness))
        self._advance_(record)
        return self.version

    def write_(self, write: RowWrite) -> int:
        """Overwrite rows as one version and return it; optimizer state stays.

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
        self._advance_(write)
        return self.version

    def _is_next(self, version: int) -> bool:
        if version == self.version + 1:
            return True
        if version == self.version:
            return False
        raise VersionGap(f"shard {self.shard} is at version {self.version}, the record is {version}")

    def _advance_(self, record: Record | RowWrite) -> None:
        self.version = record.version
        self._records.append(record)

    def _update_rows_(self, index: Index, gradient: Tensor, bias_gradient: Tensor, record: Record, step: int) -> None:
        optimizer, lr = self.spec.optimizer, record.learning_rate
        state = {name: value[index] for name, value in self.weight_state.items()}
        rows, state = updated(optimizer, self.weights[index].to(self.compute_dtype), gradient, state, lr, step)
        self.weights[index] = self._stored(rows, index, record.version)
        _put(self.weight_state, index, state)
        if self.spec.bias:
            state = {name: value[index] for name, value in self.bias_state.items()}
            column, gradient_column = self.biases[index][:, None], bias_gradient[:, None]
            column, state = updated(optimizer, column, gradient_column, state, lr, step)
            self.biases[index] = column[:, 0]
            _put(self.bias_state, index, state)

    def _stored(self, rows: Tensor, index: Index, version: int) -> Tensor:
        if self.weights.dtype != torch.bfloat16:
            return rows
        placement = self.spec.placement
        row_index = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
        class_ids = placement.first_class(self.shard) + row_index * placement.stride()
        return round_stochastically(rows, self.spec.initializer.seed, version, class_ids)

    # Parts seen from this shard

    def _gather(self, row_index: Tensor) -> tuple[Tensor, Tensor]:
        return self.weights[row_index].to(self.compute_dtype), self.biases[row_index]

    def _label_columns(self, part: Part) -> kernel.LabelColumns:
        labels = part.batch.labels
        batch_row, column = torch.nonzero(self.spec.placement.owned(self.shard, labels), as_tuple=True)
        row_index = self.spec.placement.rows(self.shard, labels[batch_row, column])
        weight = part.batch.label_weights[batch_row, column]
        log_weight = None if part.candidates is None else part.candidates.label_log_weight[batch_row, column]
        return kernel.LabelColumns(batch_row, column, row_index, weight, log_weight)

    def _candidate_columns(self, candidates: Candidates) -> kernel.CandidateColumns:
        mine = self.spec.placement.owned(self.shard, candidates.class_ids)
        class_ids = candidates.class_ids[mine]
        rows, biases = self._gather(self.spec.placement.rows(self.shard, class_ids))
        after_hit = candidates.log_weight_after_hit
        return kernel.CandidateColumns(
            class_ids,
            rows,
            biases + candidates.log_weight[mine],
            None if after_hit is None else biases + after_hit[mine],
        )

    def _chunks(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows whose logits against num_rows of hidden stay within CHUNK_LOGITS."""
        size = max(64, kernel.CHUNK_LOGITS // max(1, num_rows) // 64 * 64)
        for start in range(0, self.num_rows, size):
            yield start, min(start + size, self.num_rows)

    def _full_partial(self, hidden: Tensor, with_mean_row: bool) -> Partial:
        total = Partial.empty(len(hidden), self.spec.dim, self.compute_dtype, with_mean_row)
        for start, end in self._chunks(len(hidden)):
            _, rows, biases = self.dense_rows(start, end)
            total = merge(total, kernel.full_partial(hidden, rows, biases, with_mean_row))
        return total

    def _touched_gradient(
        self, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient through candidate and label columns: row index [M] ascending and distinct, [M, D] and [M].

        Gradients that hit the same row are summed, one piece at a time.
        """
        distinct = torch.unique(torch.cat([self._touched_rows(part) for part in parts]))
        rows = torch.zeros(len(distinct), self.spec.dim, dtype=self.compute_dtype)
        biases = torch.zeros(len(distinct), dtype=self.compute_dtype)
        for part, up in zip(parts, upstreams, strict=True):
            for index, piece_rows, piece_biases in self._column_gradients(part, up):
                place = torch.searchsorted(distinct, index)
                rows.index_add_(0, place, piece_rows)
                biases.index_add_(0, place, piece_biases)
        return distinct, rows, biases

    def _touched_rows(self, part: Part) -> Tensor:
        """Rows of this shard among a part's labels and candidates; [L], with repeats."""
        placement = self.spec.placement
        class_ids = part.batch.labels.flatten()
        if part.candidates is not None:
            class_ids = torch.cat([class_ids, part.candidates.class_ids])
        return placement.rows(self.shard, class_ids[placement.owned(self.shard, class_ids)])

    def _column_gradients(self, part: Part, up: Upstream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batch = part.batch
        labels = self._label_columns(part)
        label_rows, label_biases = self._gather(labels.row_index)
        logits = kernel.label_logits(batch.hidden, labels, label_rows, label_biases)
        dz = kernel.label_logit_gradient(labels, logits, up.lse, up.g, batch.mass)
        yield labels.row_index, dz[:, None] * batch.hidden[labels.batch_row], dz
        if part.candidates is not None:
            for columns in kernel.candidate_ranges(self._candidate_columns(part.candidates), len(batch.hidden)):
                logits = kernel.candidate_logits(batch.hidden, batch.labels, columns)
                dz = kernel.logit_gradient(logits, up.lse, up.g * batch.mass)
                yield self.spec.placement.rows(self.shard, columns.class_ids), dz.T @ batch.hidden, dz.sum(0)

    def _dense_gradient(
        self, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...], touched: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[Index, Tensor, Tensor]]:
        """Gradient of every row, in chunks of rows: the full-softmax parts plus what the columns touched.

        A chunk's logits depend on its own rows alone, so the caller may update a chunk before asking for the next.
        """
        full = [(part.batch, up) for part, up in zip(parts, upstreams, strict=True) if part.candidates is None]
        row_index, touched_rows, touched_biases = touched
        for start, end in self._chunks(max(len(batch.hidden) for batch, _ in full)):
            _, rows, biases = self.dense_rows(start, end)
            gradient, bias_gradient = torch.zeros_like(rows), torch.zeros_like(biases)
            for batch, up in full:
                dz = kernel.logit_gradient(torch.addmm(biases, batch.hidden, rows.T), up.lse, up.g * batch.mass)
                gradient.addmm_(dz.T, batch.hidden)
                bias_gradient += dz.sum(0)
            low, high = torch.searchsorted(row_index, torch.tensor([start, end])).tolist()
            gradient[row_index[low:high] - start] += touched_rows[low:high]
            bias_gradient[row_index[low:high] - start] += touched_biases[low:high]
            yield slice(start, end), gradient, bias_gradient


def in_blocks(touched: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Touched rows, UPDATE_ROWS at a time."""
    index, rows, biases = touched
    for start in range(0, len(index), UPDATE_ROWS):
        block = slice(start, start + UPDATE_ROWS)
        yield index[block], rows[block], biases[block]


def _put(state: State, index: Index, new: State) -> None:
    for name, value in new.items():
        state[name][index] = value
