"""Columns of a part on one shard: those whose rows the shard owns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from shardloss_server.numerics import kernel, ranking
from shardloss_server.numerics.exponentials import Exponentials, Narrow
from shardloss_server.numerics.partial import Partial, Spread, Statistics, Sums, combine
from shardloss_server.numerics.transform import PLAIN
from shardloss_server.shard.kept import Kept, KeptEntries, KeptPart
from shardloss_server.shard.record import Candidates, Mined, Part, RowCandidates, Score
from shardloss_server.shard.rows import ShardRows


def score(rows: ShardRows, part: Part, with_gradient: bool, version: int, kept: Kept | None) -> Score:
    """Score a part over the shard's columns; statistics with D columns are computed only if with_gradient.

    Results that a later step can reuse are kept in kept, if it is given.
    """
    labels, hidden = label_entries(rows, part), as_multiplied(rows, part, part.batch.hidden)
    found = kernel.entry_columns(hidden, labels, part.objective)
    target = kernel.target_of(len(part.batch.hidden), labels, found, with_gradient)
    of_part = kept.begin(part) if kept is not None else None
    if of_part is not None:
        of_part.keep_labels(labels)
    start = entry_statistics(rows, part, labels, found, with_gradient, of_part)
    total = with_blocks(rows, part, start, with_gradient, of_part)
    return Score(total, target, spread(rows, part), version, range(rows.shard, rows.shard + 1))


def entry_statistics(
    rows: ShardRows,
    part: Part,
    labels: kernel.Entries,
    of_labels: kernel.Columns,
    with_gradient: bool,
    of_part: KeptPart | None,
) -> Statistics:
    """Return the statistics of the candidates of single rows, and of the true columns if they are separate.

    The candidates' columns are kept in of_part, if it is given.
    """
    hidden, family = part.batch.hidden, part.objective.family
    pieces: list[Statistics] = []
    if part.has_columns_apart:
        pieces.append(kernel.entry_statistics(len(hidden), labels, of_labels, with_gradient, family))
    scored = []
    for entries in row_entries(rows, part):
        columns = kernel.entry_columns(hidden, entries, part.objective)
        pieces.append(kernel.entry_statistics(len(hidden), entries, columns, with_gradient, family))
        if of_part is not None and not part.objective.transform.normalize:
            scored.append(KeptEntries(entries.batch_row, entries.row_index, columns))
    if of_part is not None and scored:
        of_part.keep_entries(KeptEntries.cat(scored))
    return reduce(combine, pieces) if pieces else no_columns(rows, part, with_gradient)


def with_blocks(
    rows: ShardRows, part: Part, total: Statistics, with_gradient: bool, of_part: KeptPart | None
) -> Statistics:
    """Add the statistics of each block to the total, keeping the blocks' exponentials in of_part, if it is given."""
    hidden, objective = part.batch.hidden, part.objective
    sums = kernel.SoftmaxSums(total, rows.compute_dtype) if isinstance(total, Partial) else None
    narrow = Narrow(hidden) if is_narrow(rows, part) else None
    dtype = rows.compute_dtype if narrow is None else torch.bfloat16
    for place, (_, block) in enumerate(blocks(rows, part)):
        if sums is None:
            columns = kernel.block_columns(hidden, block, objective)
            total = combine(total, kernel.block_sums(columns, block.rows, with_gradient))
            continue
        is_kept = of_part is not None and objective.transform.soft_cap is None
        out = of_part.memory(len(hidden), len(block.rows), dtype) if of_part is not None and is_kept else None
        if narrow is not None:
            exponentials: Exponentials | None = sums.add_narrow_(narrow, block.rows, out)
        else:
            exponentials = sums.add_(kernel.block_columns(hidden, block, objective, out), block.rows)
        if of_part is not None:
            of_part.keep(place, block, exponentials)
    return total if sums is None else sums.partial()


def mine(rows: ShardRows, part: Part, k: int, version: int) -> Mined:
    """Return the k best candidates of each row among the shard's, excluding accidental hits."""
    none = torch.zeros(len(part.batch.hidden), 0, dtype=rows.compute_dtype)
    found = ranking.Best(none.long(), none, none)
    for class_ids, block in blocks(rows, part):
        logits = kernel.block_columns(part.batch.hidden, block, part.objective).logits
        logits = torch.where(torch.isnan(logits), torch.inf, logits)  # an overflow: mined, then its loss is refused
        log_weight = torch.zeros_like(block.biases) if block.log_weight is None else block.log_weight
        kept = torch.where(torch.isneginf(logits), logits, log_weight)
        found = ranking.ordered(ranking.beside(found, ranking.best(class_ids, logits, kept, k)), k)
    return Mined(found.class_ids, found.keys, found.logits, version)


def no_columns(rows: ShardRows, part: Part, with_gradient: bool) -> Statistics:
    """Return the statistics of an empty set of columns."""
    kind = Sums if part.objective.family == "logistic" else Partial
    num_rows, with_pull = len(part.batch.hidden), part.objective.learned_scale
    return kind.empty(num_rows, rows.spec.dim, rows.compute_dtype, with_gradient, with_pull)


def label_entries(rows: ShardRows, part: Part) -> kernel.Entries:
    """Gather the true columns that the shard owns."""
    batch, candidates = part.batch, part.candidates
    at = torch.nonzero(rows.spec.placement.owned(rows.shard, batch.labels), as_tuple=True)
    log_weight = None if candidates is None else candidates.label_log_weight[at]
    return entries_of(rows, part, at[0], batch.labels[at], batch.label_weights[at], log_weight)


def row_entries(rows: ShardRows, part: Part) -> Iterator[kernel.Entries]:
    """Yield the owned candidates of single rows, in ranges whose rows have at most ENTRY_ELEMENTS elements."""
    own = part.candidates
    if not isinstance(own, RowCandidates):
        return
    mine = rows.spec.placement.owned(rows.shard, own.class_ids) & ~torch.isneginf(own.log_weight)
    batch_row, column = torch.nonzero(mine, as_tuple=True)
    size = max(1, kernel.ENTRY_ELEMENTS // rows.spec.dim)
    for n, s in zip(torch.split(batch_row, size), torch.split(column, size), strict=True):
        if len(n):
            yield entries_of(rows, part, n, own.class_ids[n, s], None, own.log_weight[n, s])


def entries_of(
    rows: ShardRows,
    part: Part,
    batch_row: Tensor,
    class_ids: Tensor,
    weight: Tensor | None,
    log_weight: Tensor | None,
) -> kernel.Entries:
    """Gather the entries [L] of owned classes."""
    row_index = rows.spec.placement.rows(rows.shard, class_ids)
    gathered, biases, norms = rows.gather(row_index, part.objective.transform)
    return kernel.Entries(batch_row, row_index, gathered, biases, norms, weight, log_weight)


def blocks(rows: ShardRows, part: Part) -> Iterator[tuple[Tensor, kernel.Block]]:
    """Yield class ids [C] and columns of each block that all rows of hidden share: a chunk of rows, or candidates."""
    if part.is_full:
        for start, end in rows.chunks(len(part.batch.hidden)):
            yield dense_block(rows, part, start, end)
    elif isinstance(part.candidates, Candidates):
        yield from candidate_blocks(rows, part, part.candidates)


def is_narrow(rows: ShardRows, part: Part) -> bool:
    """Return True if a part is computed from bfloat16 products: all classes, plain logits and a bfloat16 table.

    Other parts, and all parts if the hardware has no fast bfloat16 products, use float32 with the same rows.
    """
    objective = part.objective
    plain = objective.family == "softmax" and objective.transform == PLAIN and objective.margin is None
    return rows.multiplies_bfloat16 and part.is_full and plain and not objective.learned_scale


def as_multiplied(rows: ShardRows, part: Part, hidden: Tensor) -> Tensor:
    """Return hidden [N, D] rounded as in the part's products.

    With unrounded hidden, the logit of a label could exceed the log-sum-exp that includes it.
    """
    return hidden.to(torch.bfloat16).to(hidden.dtype) if is_narrow(rows, part) else hidden


def dense_block(rows: ShardRows, part: Part, start: int, end: int) -> tuple[Tensor, kernel.Block]:
    """Return class ids and columns of a range of rows; labels that have columns of their own are masked."""
    class_ids = rows.class_ids(slice(start, end))
    if is_narrow(rows, part):
        return class_ids, kernel.Block(rows.weights[start:end], rows.biases[start:end], None, None, None)
    gathered, biases, norms = rows.gather(slice(start, end), part.objective.transform)
    hits = None
    if part.has_columns_apart:
        hits = kernel.Hits(part.batch.labels, class_ids, None, torch.full_like(biases, -torch.inf))
    return class_ids, kernel.Block(gathered, biases, norms, None, hits)


def candidate_blocks(rows: ShardRows, part: Part, candidates: Candidates) -> Iterator[tuple[Tensor, kernel.Block]]:
    """Yield class ids and columns of the owned candidates, in ranges."""
    for place in candidate_places(rows, part, candidates):
        yield candidates.class_ids[place], candidate_block(rows, part, candidates, place)


def candidate_places(rows: ShardRows, part: Part, candidates: Candidates) -> tuple[Tensor, ...]:
    """Return the positions of the owned candidates, in ranges whose logits stay within CHUNK_LOGITS."""
    mine = torch.nonzero(rows.spec.placement.owned(rows.shard, candidates.class_ids))[:, 0]
    return torch.split(mine, max(64, kernel.CHUNK_LOGITS // max(1, len(part.batch.hidden))))


def candidate_block(rows: ShardRows, part: Part, candidates: Candidates, place: Tensor) -> kernel.Block:
    """Gather the columns of the candidates at place [C]."""
    row_index = rows.spec.placement.rows(rows.shard, candidates.class_ids[place])
    gathered, biases, norms = rows.gather(row_index, part.objective.transform)
    return kernel.Block(
        gathered, biases, norms, candidates.log_weight[place], hits_of(part.batch.labels, candidates, place)
    )


def hits_of(labels: Tensor, candidates: Candidates, place: Tensor) -> kernel.Hits | None:
    """Return the accidental hits to remove from the candidates at place [C], or None if hits stay."""
    after_hit = candidates.log_weight_after_hit
    if after_hit is None:
        return None
    if candidates.hit_ids is None or candidates.label_hit_ids is None:
        return kernel.Hits(labels, candidates.class_ids[place], None, after_hit[place])
    keys, order = torch.sort(candidates.hit_ids[place])
    return kernel.Hits(candidates.label_hit_ids, keys, order, after_hit[place])


def spread(rows: ShardRows, part: Part) -> Spread | None:
    """Return the sums of u_v row_v and u_v b_v over all rows for label smoothing, or None without it."""
    if part.batch.spread is None:
        return None
    row = torch.zeros(rows.spec.dim, dtype=torch.float64)
    bias = torch.zeros((), dtype=torch.float64)
    for start, end in rows.blocks():
        gathered, biases, _ = rows.gather(slice(start, end), part.objective.transform)
        weights = class_weights(rows, part, start, end)
        row += weights @ gathered.double()
        bias += weights @ biases.double()
    return Spread(row, bias)


def class_weights(rows: ShardRows, part: Part, start: int, end: int) -> Tensor:
    """Return the class weights u [R] of a range of rows, in float64."""
    if part.class_weights is None:
        return torch.ones(end - start, dtype=torch.float64)
    return part.class_weights[rows.class_ids(slice(start, end))].double()
