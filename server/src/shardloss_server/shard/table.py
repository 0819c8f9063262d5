"""One shard of one table: its rows, their optimizer state and its version."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from shardloss_server.numerics import kernel, ranking
from shardloss_server.numerics.initializer import fill_rows_, round_stochastically
from shardloss_server.numerics.loss import weight_of_softmax
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.optimizer import State, initial_state, updated
from shardloss_server.numerics.partial import Partial, Spread, Statistics, Sums, combine
from shardloss_server.numerics.transform import norms_of, project
from shardloss_server.shard.ledger import Ledger, Outcome
from shardloss_server.shard.record import (
    Candidates,
    Mined,
    Part,
    Record,
    RowCandidates,
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
        """What this shard's columns say of a part; rows of D only where a gradient is wanted."""
        hidden, objective = part.batch.hidden, part.objective
        labels = self._label_entries(part)
        columns = kernel.entry_columns(hidden, labels, objective)
        target = kernel.target_of(len(hidden), labels, columns, with_gradient)
        total = self._no_columns(part, with_gradient)
        family = objective.family
        if part.has_columns_apart:
            total = combine(total, kernel.entry_statistics(len(hidden), labels, columns, with_gradient, family))
        for entries in self._row_entries(part):
            columns = kernel.entry_columns(hidden, entries, objective)
            total = combine(total, kernel.entry_statistics(len(hidden), entries, columns, with_gradient, family))
        for _, block in self._blocks(part):
            columns = kernel.block_columns(hidden, block, objective)
            total = combine(total, kernel.block_statistics(columns, block.rows, with_gradient, family))
        return Score(total, target, self._spread(part), self.version)

    def mine(self, part: Part, k: int) -> Mined:
        """The k best candidates of each row among this shard's, accidental hits left out."""
        num_rows = len(part.batch.hidden)
        none = torch.zeros(num_rows, 0, dtype=self.compute_dtype)
        found = ranking.Best(none.long(), none, none)
        for class_ids, block in self._blocks(part):
            logits = kernel.block_columns(part.batch.hidden, block, part.objective).logits
            log_weight = torch.zeros_like(block.biases) if block.log_weight is None else block.log_weight
            kept = torch.where(torch.isneginf(logits), logits, log_weight)
            found = ranking.ordered(ranking.beside(found, ranking.best(class_ids, logits, kept, k)), k)
        return Mined(found.class_ids, found.keys, found.logits, self.version)

    def gradient(self, part: Part, upstream: Upstream) -> RowGradient:
        """Gradient of sum(g * loss) in this shard's touched rows, class ids ascending; all rows for a full softmax."""
        row_index, rows, biases = self._touched_gradient((part,), (upstream,))
        if part.is_full:
            chunks = list(self._dense_gradient((part,), (upstream,), (row_index, rows, biases)))
            row_index = torch.arange(self.num_rows)
            rows = torch.cat([chunk[1] for chunk in chunks]) if chunks else rows[:0]
            biases = torch.cat([chunk[2] for chunk in chunks]) if chunks else biases[:0]
        return RowGradient(self._class_ids(row_index), rows, biases)

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
            if any(part.is_full for part in record.parts):
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
        row_index = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
        return round_stochastically(rows, self.spec.initializer.seed, version, self._class_ids(row_index))

    # Parts seen from this shard

    def _gather(self, row_index: Index, objective: Objective) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows as the objective's transform makes them, their biases, and their norms where it normalises."""
        rows, biases = self.weights[row_index].to(self.compute_dtype), self.biases[row_index]
        transform = objective.transform
        if transform.scale != 1.0:
            biases = biases * transform.scale
        if not transform.normalize:
            return rows, biases, None
        norms = norms_of(rows)
        return rows / norms[:, None], biases, norms

    def _class_ids(self, row_index: Tensor) -> Tensor:
        placement = self.spec.placement
        return placement.first_class(self.shard) + row_index * placement.stride()

    def _no_columns(self, part: Part, with_gradient: bool) -> Statistics:
        kind = Sums if part.objective.family == "logistic" else Partial
        num_rows, with_pull = len(part.batch.hidden), part.objective.learned_scale
        return kind.empty(num_rows, self.spec.dim, self.compute_dtype, with_gradient, with_pull)

    def _label_entries(self, part: Part) -> kernel.Entries:
        """The true columns that this shard owns."""
        batch, candidates = part.batch, part.candidates
        at = torch.nonzero(self.spec.placement.owned(self.shard, batch.labels), as_tuple=True)
        log_weight = None if candidates is None else candidates.label_log_weight[at]
        return self._entries(part, at[0], batch.labels[at], batch.label_weights[at], log_weight)

    def _row_entries(self, part: Part) -> Iterator[kernel.Entries]:
        """The candidates of single rows that this shard owns, in ranges of at most ENTRY_ELEMENTS of rows."""
        own = part.candidates
        if not isinstance(own, RowCandidates):
            return
        mine = self.spec.placement.owned(self.shard, own.class_ids) & ~torch.isneginf(own.log_weight)
        batch_row, column = torch.nonzero(mine, as_tuple=True)
        size = max(1, kernel.ENTRY_ELEMENTS // self.spec.dim)
        for n, s in zip(torch.split(batch_row, size), torch.split(column, size), strict=True):
            if len(n):
                yield self._entries(part, n, own.class_ids[n, s], None, own.log_weight[n, s])

    def _entries(
        self, part: Part, batch_row: Tensor, class_ids: Tensor, weight: Tensor | None, log_weight: Tensor | None
    ) -> kernel.Entries:
        row_index = self.spec.placement.rows(self.shard, class_ids)
        rows, biases, norms = self._gather(row_index, part.objective)
        return kernel.Entries(batch_row, row_index, rows, biases, norms, weight, log_weight)

    def _blocks(self, part: Part) -> Iterator[tuple[Tensor, kernel.Block]]:
        """Class ids [C] and columns of the part that all rows of hidden share: chunks of all rows, or candidates."""
        if part.is_full:
            for start, end in self._chunks(len(part.batch.hidden)):
                yield self._dense_block(part, start, end)
        elif isinstance(part.candidates, Candidates):
            yield from self._candidate_blocks(part, part.candidates)

    def _dense_block(self, part: Part, start: int, end: int) -> tuple[Tensor, kernel.Block]:
        class_ids = self.spec.placement.class_ids(self.shard, start, end)
        rows, biases, norms = self._gather(slice(start, end), part.objective)
        hits = None
        if part.has_columns_apart:
            hits = kernel.Hits(part.batch.labels, class_ids, None, torch.full_like(biases, -torch.inf))
        return class_ids, kernel.Block(rows, biases, norms, None, hits)

    def _candidate_blocks(self, part: Part, candidates: Candidates) -> Iterator[tuple[Tensor, kernel.Block]]:
        """Owned candidates in ranges whose logits stay within SAMPLED_LOGITS; usually one."""
        mine = torch.nonzero(self.spec.placement.owned(self.shard, candidates.class_ids))[:, 0]
        size = max(64, kernel.SAMPLED_LOGITS // max(1, len(part.batch.hidden)))
        for place in torch.split(mine, size):
            class_ids = candidates.class_ids[place]
            rows, biases, norms = self._gather(self.spec.placement.rows(self.shard, class_ids), part.objective)
            hits = hits_of(part.batch.labels, candidates, place)
            yield class_ids, kernel.Block(rows, biases, norms, candidates.log_weight[place], hits)

    def _chunks(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows whose logits against num_rows of hidden stay within CHUNK_LOGITS."""
        size = max(64, kernel.CHUNK_LOGITS // max(1, num_rows) // 64 * 64)
        for start in range(0, self.num_rows, size):
            yield start, min(start + size, self.num_rows)

    def _spread(self, part: Part) -> Spread | None:
        """Sums of u_v row_v and u_v b_v over all rows, for label smoothing."""
        if part.batch.spread is None:
            return None
        row = torch.zeros(self.spec.dim, dtype=torch.float64)
        bias = torch.zeros((), dtype=torch.float64)
        for start in range(0, self.num_rows, UPDATE_ROWS):
            end = min(start + UPDATE_ROWS, self.num_rows)
            rows, biases, _ = self._gather(slice(start, end), part.objective)
            weights = self._class_weights(part, start, end)
            row += weights @ rows.double()
            bias += weights @ biases.double()
        return Spread(row, bias)

    def _class_weights(self, part: Part, start: int, end: int) -> Tensor:
        """u [R] of a range of rows, float64."""
        if part.class_weights is None:
            return torch.ones(end - start, dtype=torch.float64)
        return part.class_weights[self.spec.placement.class_ids(self.shard, start, end)].double()

    # Gradients of rows

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
            class_ids = torch.cat([class_ids, part.candidates.class_ids.flatten()])
        return placement.rows(self.shard, class_ids[placement.owned(self.shard, class_ids)])

    def _column_gradients(self, part: Part, up: Upstream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row index, gradient of rows, gradient of biases) of each piece of a part's sparse columns."""
        weight = weight_of_columns(part, up.lse)
        labels = self._label_entries(part)
        yield labels.row_index, *self._entry_gradient(part, labels, up, weight, part.has_columns_apart)
        for entries in self._row_entries(part):
            yield entries.row_index, *self._entry_gradient(part, entries, up, weight, True)
        if isinstance(part.candidates, Candidates):
            for class_ids, block in self._candidate_blocks(part, part.candidates):
                row_index = self.spec.placement.rows(self.shard, class_ids)
                yield row_index, *self._block_gradient(part, block, up, weight)

    def _entry_gradient(
        self, part: Part, entries: kernel.Entries, up: Upstream, weight: Tensor, apart: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, objective = part.batch.hidden, part.objective
        columns = kernel.entry_columns(hidden, entries, objective)
        dz = kernel.entry_gradient(entries, columns, up.lse, up.g, weight, objective.family, apart)
        gradient = dz[:, None] * hidden[entries.batch_row]
        if entries.norms is not None:
            gradient = project(gradient, entries.rows, entries.norms)
        return gradient, dz * objective.transform.scale

    def _block_gradient(
        self, part: Part, block: kernel.Block, up: Upstream, weight: Tensor, spread: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """spread [C] is u_v of the block's classes where labels are smoothed."""
        hidden, objective = part.batch.hidden, part.objective
        columns = kernel.block_columns(hidden, block, objective)
        dz = kernel.block_gradient(columns, up.lse, up.g * weight, objective.family)
        gradient, bias = dz.T @ hidden, dz.sum(0)
        if spread is not None and part.batch.spread is not None:
            g = up.g * part.batch.spread
            gradient -= spread[:, None] * (g @ hidden)
            bias -= spread * g.sum()
        if block.norms is not None:
            gradient = project(gradient, block.rows, block.norms)
        return gradient, bias * objective.transform.scale

    def _dense_gradient(
        self, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...], touched: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[Index, Tensor, Tensor]]:
        """Gradient of every row, in chunks of rows: the full-softmax parts plus what the columns touched.

        A chunk's logits depend on its own rows alone, so the caller may update a chunk before asking for the next.
        """
        full = [(part, up) for part, up in zip(parts, upstreams, strict=True) if part.is_full]
        row_index, touched_rows, touched_biases = touched
        for start, end in self._chunks(max(len(part.batch.hidden) for part, _ in full)):
            gradient = torch.zeros(end - start, self.spec.dim, dtype=self.compute_dtype)
            bias_gradient = torch.zeros(end - start, dtype=self.compute_dtype)
            for part, up in full:
                _, block = self._dense_block(part, start, end)
                spread = None
                if part.batch.spread is not None:
                    spread = self._class_weights(part, start, end).to(self.compute_dtype)
                piece = self._block_gradient(part, block, up, weight_of_columns(part, up.lse), spread)
                gradient += piece[0]
                bias_gradient += piece[1]
            low, high = torch.searchsorted(row_index, torch.tensor([start, end])).tolist()
            gradient[row_index[low:high] - start] += touched_rows[low:high]
            bias_gradient[row_index[low:high] - start] += touched_biases[low:high]
            yield slice(start, end), gradient, bias_gradient


def weight_of_columns(part: Part, lse: Tensor) -> Tensor:
    """Factor of p in d loss / d z [N]: a softmax's by mass, lse and z-loss; 1 for a counted row of a logistic loss."""
    mass = part.batch.mass
    if part.objective.family == "logistic":
        return (mass != 0).to(mass.dtype)
    return weight_of_softmax(mass, lse, part.objective.z_loss)


def hits_of(labels: Tensor, candidates: Candidates, place: Tensor) -> kernel.Hits | None:
    """How accidental hits are removed from the candidates at place [C]; None where they are kept."""
    after_hit = candidates.log_weight_after_hit
    if after_hit is None:
        return None
    if candidates.hit_ids is None or candidates.label_hit_ids is None:
        return kernel.Hits(labels, candidates.class_ids[place], None, after_hit[place])
    keys, order = torch.sort(candidates.hit_ids[place])
    return kernel.Hits(candidates.label_hit_ids, keys, order, after_hit[place])


def in_blocks(touched: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Touched rows, UPDATE_ROWS at a time."""
    index, rows, biases = touched
    for start in range(0, len(index), UPDATE_ROWS):
        block = slice(start, start + UPDATE_ROWS)
        yield index[block], rows[block], biases[block]


def _put(state: State, index: Index, new: State) -> None:
    for name, value in new.items():
        state[name][index] = value
