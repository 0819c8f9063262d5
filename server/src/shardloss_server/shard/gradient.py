"""Gradients of a shard's rows: of those that labels and candidates touch, or of all rows for a full loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardloss_server.numerics import kernel
from shardloss_server.numerics.correction import in_order
from shardloss_server.numerics.exponentials import CACHED, Narrow, Rescaled
from shardloss_server.numerics.loss import mass_of_gradient, weight_of_softmax
from shardloss_server.numerics.transform import project
from shardloss_server.shard import columns
from shardloss_server.shard.distribution import Collected
from shardloss_server.shard.kept import Kept, KeptBlock, KeptEntries, KeptPart
from shardloss_server.shard.record import Candidates, Part, RowCandidates, Upstream
from shardloss_server.shard.rows import Index, ShardRows

GROUP_BYTES = 64 * 2**20  # hidden of several parts that is copied into one tensor
Touched = tuple[Tensor, Tensor, Tensor]  # distinct row index [M], gradient of rows [M, D], of biases [M]


class Touch:
    """The rows that parts touch, each once: first the block, then the others, both ascending.

    The block is the candidates of one part, usually nearly all of the rows. Its gradients are written directly, and
    other gradients of the same rows are added; index_add_ over everything would run at 2 GB/s.
    """

    def __init__(self, rows: ShardRows, parts: tuple[Part, ...]) -> None:
        self.block_part, self.block = distinct_candidates(rows, parts)
        touched = torch.cat([touched_rows(rows, part, number != self.block_part) for number, part in enumerate(parts)])
        self._others = torch.unique(touched[~self._in_block(touched)[0]])
        self.index = torch.cat([self.block, self._others])

    def _in_block(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows are in the block, and their positions in it."""
        if len(self.block) == 0:
            return torch.zeros_like(index, dtype=torch.bool), index
        place = torch.searchsorted(self.block, index).clamp_(max=len(self.block) - 1)
        return self.block[place] == index, place

    def add_(self, total: Tensor, index: Tensor, piece: Tensor, is_shared: bool) -> None:
        """Add the values [L, ...] of rows [L] to a total ordered as `self.index`; is_shared marks shared candidates."""
        is_in_block, place = self._in_block(index)
        if is_shared and len(index) and bool(is_in_block[0]):
            run = slice(int(place[0]), int(place[0]) + len(index))
            if torch.equal(index, self.block[run]):  # parts of one step usually share candidates
                total[run] += piece
                return
        elsewhere = len(self.block) + torch.searchsorted(self._others, index)
        total.index_add_(0, torch.where(is_in_block, place, elsewhere), piece)


def touched_gradient(rows: ShardRows, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...], kept: Kept) -> Touched:
    """Return the gradient through candidate and label columns.

    Gradients of the same row are summed, one piece at a time.
    """
    if not any(isinstance(part.candidates, Candidates) or part.objective.transform.normalize for part in parts):
        return entries_gradient(rows, parts, upstreams, kept)
    touch = Touch(rows, parts)
    gradient = torch.empty(len(touch.index), rows.spec.dim, dtype=rows.compute_dtype)
    biases = torch.empty(len(touch.index), dtype=rows.compute_dtype)
    gradient[len(touch.block) :], biases[len(touch.block) :] = 0.0, 0.0
    if touch.block_part is not None:
        part, up, end = parts[touch.block_part], upstreams[touch.block_part], 0
        for index, of_rows, of_biases in candidate_gradients(rows, part, up, kept.of(part)):
            run = slice(end, end + len(index))
            gradient[run], biases[run], end = of_rows, of_biases, run.stop
    for number, (part, up) in enumerate(zip(parts, upstreams, strict=True)):
        shared = iter(()) if number == touch.block_part else candidate_gradients(rows, part, up, kept.of(part))
        for pieces, is_shared in ((own_gradients(rows, part, up, kept.of(part)), False), (shared, True)):
            for index, of_rows, of_biases in pieces:
                touch.add_(gradient, index, of_rows, is_shared)
                touch.add_(biases, index, of_biases, is_shared)
    return touch.index, gradient, biases


def entries_gradient(rows: ShardRows, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...], kept: Kept) -> Touched:
    """Return the gradient if all columns are entries of unnormalised rows, computed for some parts at a time."""
    sums = [entries_sum(rows, some, kept) for some in grouped(list(zip(parts, upstreams, strict=True)))]
    if len(sums) == 1:
        return sums[0]
    index = torch.unique(torch.cat([found for found, _, _ in sums]))
    gradient = torch.zeros(len(index), rows.spec.dim, dtype=rows.compute_dtype)
    biases = torch.zeros(len(index), dtype=rows.compute_dtype)
    for found, of_rows, of_biases in sums:
        place = torch.searchsorted(index, found)
        gradient.index_add_(0, place, of_rows)
        biases.index_add_(0, place, of_biases)
    return index, gradient, biases


def grouped(pairs: list[tuple[Part, Upstream]]) -> Iterator[list[tuple[Part, Upstream]]]:
    """Yield runs of parts, each of one part or with at most GROUP_BYTES of hidden."""
    some: list[tuple[Part, Upstream]] = []
    for pair in pairs:
        if some and sum(part.batch.hidden.nbytes for part, _ in (*some, pair)) > GROUP_BYTES:
            yield some
            some = []
        some.append(pair)
    yield some


def entries_sum(rows: ShardRows, pairs: Sequence[tuple[Part, Upstream]], kept: Kept) -> Touched:
    """Return the sums of dz hidden per row over some parts, in one pass; the hidden of several parts is copied."""
    found, first_row = [], 0
    for part, up in pairs:
        scale = part.objective.transform.scale
        for row_index, batch_row, dz in entry_derivatives(rows, part, up, kept.of(part)):
            found.append((row_index, batch_row + first_row, dz, dz * scale))
        first_row += len(part.batch.hidden)
    row_index, batch_row, dz, of_bias = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    ordered, order = in_order(row_index)
    index, place, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    hidden = pairs[0][0].batch.hidden if len(pairs) == 1 else torch.cat([part.batch.hidden for part, _ in pairs])
    gradient = kernel.bags(dz[order], batch_row[order], hidden, counts)
    biases = torch.zeros(len(index), dtype=rows.compute_dtype)
    return index, gradient, biases.index_add_(0, place, of_bias[order]) if rows.spec.bias else biases


def entry_derivatives(
    rows: ShardRows, part: Part, up: Upstream, kept: KeptPart
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (row index, row of hidden, dz), each [L], for a part's labels and for its rows' own candidates."""
    hidden, objective = part.batch.hidden, part.objective
    rescaled = Rescaled(hidden, up.lse, up.g * weight_of_columns(part, up.lse))
    labels = kept.labels or columns.label_entries(rows, part)
    found = kernel.entry_columns(hidden, labels, objective)
    apart = part.has_columns_apart
    dz = kernel.entry_gradient(labels.batch_row, labels.weight, found, rescaled, up.g, objective.family, apart)
    yield labels.row_index, labels.batch_row, dz
    if not isinstance(part.candidates, RowCandidates):
        return
    for own in (kept.entries,) if kept.entries is not None else columns.row_entries(rows, part):
        found = own.columns if isinstance(own, KeptEntries) else kernel.entry_columns(hidden, own, objective)
        dz = kernel.entry_gradient(own.batch_row, None, found, rescaled, up.g, objective.family, True)
        yield own.row_index, own.batch_row, dz


def distinct_candidates(rows: ShardRows, parts: tuple[Part, ...]) -> tuple[int | None, Tensor]:
    """Return the number of the first part that has shared candidates, and their rows [C].

    If there is no such part, or its rows are not distinct and ascending, return None and no rows.
    """
    none = torch.zeros(0, dtype=torch.int64)
    for number, part in enumerate(parts):
        if isinstance(part.candidates, Candidates):
            places = columns.candidate_places(rows, part, part.candidates)
            index = rows.spec.placement.rows(rows.shard, part.candidates.class_ids[torch.cat(places)])
            return (number, index) if bool((index[1:] > index[:-1]).all()) else (None, none)
    return None, none


def touched_rows(rows: ShardRows, part: Part, with_candidates: bool) -> Tensor:
    """Return the shard's rows [L] among a part's labels and candidates, with repeats."""
    placement = rows.spec.placement
    class_ids = part.batch.labels.flatten()
    if with_candidates and part.candidates is not None:
        class_ids = torch.cat([class_ids, part.candidates.class_ids.flatten()])
    return placement.rows(rows.shard, class_ids[placement.owned(rows.shard, class_ids)])


Pieces = Iterator[tuple[Tensor, Tensor, Tensor]]  # row index [L], gradient of rows [L, D], of biases [L]


def candidate_gradients(rows: ShardRows, part: Part, up: Upstream, kept: KeptPart) -> Pieces:
    """Yield the gradients through a part's shared candidates, in the candidates' order."""
    if not isinstance(part.candidates, Candidates):
        return
    rescaled = Rescaled(part.batch.hidden, up.lse, up.g * weight_of_columns(part, up.lse))
    for number, place in enumerate(columns.candidate_places(rows, part, part.candidates)):
        row_index = rows.spec.placement.rows(rows.shard, part.candidates.class_ids[place])
        scored = kept.blocks.get(number) or columns.candidate_block(rows, part, part.candidates, place)
        yield row_index, *block_gradient(part, scored, up.g, rescaled, rows.spec.bias)


def own_gradients(rows: ShardRows, part: Part, up: Upstream, kept: KeptPart) -> Pieces:
    """Yield the gradients through a part's labels and its rows' own candidates."""
    rescaled = Rescaled(part.batch.hidden, up.lse, up.g * weight_of_columns(part, up.lse))
    labels = kept.labels or columns.label_entries(rows, part)
    yield labels.row_index, *entry_gradient(part, labels, up.g, rescaled, part.has_columns_apart)
    for entries in columns.row_entries(rows, part):
        yield entries.row_index, *entry_gradient(part, entries, up.g, rescaled, True)


def entry_gradient(
    part: Part, entries: kernel.Entries, g: Tensor, rescaled: Rescaled, apart: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the row [L, D] and bias [L] of each entry."""
    hidden, objective = part.batch.hidden, part.objective
    found = kernel.entry_columns(hidden, entries, objective)
    dz = kernel.entry_gradient(entries.batch_row, entries.weight, found, rescaled, g, objective.family, apart)
    gradient = dz[:, None] * hidden[entries.batch_row]
    if entries.norms is not None:
        gradient = project(gradient, entries.rows, entries.norms)
    return gradient, dz * objective.transform.scale


def block_gradient(
    part: Part,
    scored: KeptBlock | kernel.Block,
    g: Tensor,
    rescaled: Rescaled,
    with_bias: bool,
    class_weights: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a block's rows [C, D] and biases [C], from its exponentials if they were kept.

    class_weights [C] are for label smoothing; labels are the sums of g y hidden [C, D] and g y [C] of a distribution.
    """
    hidden, objective = part.batch.hidden, part.objective
    if isinstance(scored, KeptBlock):
        gradient, bias = scored.exponentials.gradient(rescaled, with_bias)
    else:
        found = kernel.block_columns(hidden, scored, objective)
        dz = kernel.block_gradient(found, rescaled.lse, rescaled.scale, objective.family)
        gradient, bias = dz.T @ hidden, dz.sum(0)
    if class_weights is not None and part.batch.spread is not None:
        spread = g * part.batch.spread
        gradient -= class_weights[:, None] * (spread @ hidden)
        bias -= class_weights * spread.sum()
    if labels is not None:
        gradient -= labels[0]
        bias -= labels[1]
    if scored.rows is not None and scored.norms is not None:
        gradient = project(gradient, scored.rows, scored.norms)
    return gradient, bias * objective.transform.scale


def dense_gradient(
    rows: ShardRows,
    parts: tuple[Part, ...],
    upstreams: tuple[Upstream, ...],
    touched: Touched,
    collected: Collected | None,
    kept: Kept,
) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Yield the gradient of every row in chunks of rows: the parts over all classes plus the touched rows.

    A chunk's logits depend only on its own rows, so the caller may update a chunk before requesting the next.
    """
    full = [(part, up) for part, up in zip(parts, upstreams, strict=True) if part.is_full]
    rescaled = [Rescaled(part.batch.hidden, up.lse, up.g * weight_of_columns(part, up.lse)) for part, up in full]
    row_index, order = torch.sort(touched[0])
    touched_rows_, touched_biases = touched[1][order], touched[2][order]
    narrow = [Narrow(part.batch.hidden) if columns.is_narrow(rows, part) else None for part, _ in full]
    for place, (start, end) in enumerate(rows.chunks(max(len(part.batch.hidden) for part, _ in full))):
        pieces = []
        for (part, up), of_hidden, of_part in zip(full, rescaled, narrow, strict=True):
            scored: KeptBlock | kernel.Block | None = kept_chunk(rows, part, kept.of(part), place, start, end)
            scored = scored or columns.dense_block(rows, part, start, end)[1]
            if of_part is not None and isinstance(scored, kernel.Block):
                scored = KeptBlock(of_part.of(scored.rows)[0], None, None)
            of_classes = None
            if part.batch.spread is not None:
                of_classes = columns.class_weights(rows, part, start, end).to(rows.compute_dtype)
            labels = labels_of(part, collected, start, end)
            pieces.append(block_gradient(part, scored, up.g, of_hidden, rows.spec.bias, of_classes, labels))
        gradient, biases = pieces[0]
        for piece in pieces[1:]:
            gradient += piece[0]
            biases += piece[1]
        low, high = torch.searchsorted(row_index, torch.tensor([start, end])).tolist()
        gradient.index_add_(0, row_index[low:high] - start, touched_rows_[low:high])
        biases.index_add_(0, row_index[low:high] - start, touched_biases[low:high])
        yield slice(start, end), gradient, biases


def kept_chunk(rows: ShardRows, part: Part, kept: KeptPart, place: int, start: int, end: int) -> KeptBlock | None:
    """Return the chunk's kept exponentials, or None if the part was not scored in the same chunks."""
    scored = kept.blocks.get(place)
    own = rows.chunk_rows(len(part.batch.hidden))
    if scored is None or start != place * own or scored.exponentials.values.shape[1] != end - start:
        return None
    return scored


def labels_of(part: Part, collected: Collected | None, start: int, end: int) -> tuple[Tensor, Tensor] | None:
    """Return the gradient collected for a range of rows, or None if the part's labels are not a distribution.

    Raises:
        LookupError: no distribution or another one was collected; the front end's calls were out of order.
    """
    if not part.distribution:
        return None
    if collected is None or collected.name != part.distribution:
        raise LookupError(f"label distribution {part.distribution!r} was not collected on this shard")
    return collected.rows[start:end], collected.biases[start:end]


def weight_of_columns(part: Part, lse: Tensor) -> Tensor:
    """Return the factor of p in d loss / d z [N].

    A softmax's factor depends on mass, lse and z-loss; that of a logistic loss is 1 for a counted row, else 0.
    """
    mass = part.batch.mass
    if part.objective.family == "logistic":
        return (mass != 0).to(mass.dtype)
    mass = mass_of_gradient(mass, part.objective.unit_mass_gradient)
    return weight_of_softmax(mass, lse, part.objective.z_loss)


def in_blocks(touched: Touched) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Yield the touched rows in blocks that fit into the cache."""
    index, gradient, biases = touched
    size = max(64, CACHED // gradient.shape[1])
    for start in range(0, len(index), size):
        block = slice(start, start + size)
        yield index[block], gradient[block], biases[block]
