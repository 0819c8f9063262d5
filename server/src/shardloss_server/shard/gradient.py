"""Gradients of a shard's rows: those that labels and candidates touch, and those of a loss over all classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardloss_server.numerics import kernel
from shardloss_server.numerics.loss import mass_of_gradient, weight_of_softmax
from shardloss_server.numerics.transform import project
from shardloss_server.shard import columns
from shardloss_server.shard.distribution import Collected
from shardloss_server.shard.record import Candidates, Part, Upstream
from shardloss_server.shard.rows import BLOCK_ROWS, Index, ShardRows

Touched = tuple[Tensor, Tensor, Tensor]  # row index [M] ascending and distinct, gradient of rows [M, D], of biases [M]


def touched_gradient(rows: ShardRows, parts: tuple[Part, ...], upstreams: tuple[Upstream, ...]) -> Touched:
    """Gradient through candidate and label columns.

    Gradients that hit the same row are summed, one piece at a time.
    """
    distinct = torch.unique(torch.cat([touched_rows(rows, part) for part in parts]))
    gradient = torch.zeros(len(distinct), rows.spec.dim, dtype=rows.compute_dtype)
    biases = torch.zeros(len(distinct), dtype=rows.compute_dtype)
    for part, up in zip(parts, upstreams, strict=True):
        for index, piece_rows, piece_biases in column_gradients(rows, part, up):
            place = torch.searchsorted(distinct, index)
            gradient.index_add_(0, place, piece_rows)
            biases.index_add_(0, place, piece_biases)
    return distinct, gradient, biases


def touched_rows(rows: ShardRows, part: Part) -> Tensor:
    """The shard's rows among a part's labels and candidates; [L], with repeats."""
    placement = rows.spec.placement
    class_ids = part.batch.labels.flatten()
    if part.candidates is not None:
        class_ids = torch.cat([class_ids, part.candidates.class_ids.flatten()])
    return placement.rows(rows.shard, class_ids[placement.owned(rows.shard, class_ids)])


def column_gradients(rows: ShardRows, part: Part, up: Upstream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(row index, gradient of rows, gradient of biases) of each piece of a part's sparse columns."""
    weight = weight_of_columns(part, up.lse)
    labels = columns.label_entries(rows, part)
    yield labels.row_index, *entry_gradient(part, labels, up, weight, part.has_columns_apart)
    for entries in columns.row_entries(rows, part):
        yield entries.row_index, *entry_gradient(part, entries, up, weight, True)
    if isinstance(part.candidates, Candidates):
        for class_ids, block in columns.candidate_blocks(rows, part, part.candidates):
            row_index = rows.spec.placement.rows(rows.shard, class_ids)
            yield row_index, *block_gradient(part, block, up, weight)


def entry_gradient(
    part: Part, entries: kernel.Entries, up: Upstream, weight: Tensor, apart: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the row [L, D] and bias [L] of each entry."""
    hidden, objective = part.batch.hidden, part.objective
    found = kernel.entry_columns(hidden, entries, objective)
    dz = kernel.entry_gradient(entries, found, up.lse, up.g, weight, objective.family, apart)
    gradient = dz[:, None] * hidden[entries.batch_row]
    if entries.norms is not None:
        gradient = project(gradient, entries.rows, entries.norms)
    return gradient, dz * objective.transform.scale


def block_gradient(
    part: Part,
    block: kernel.Block,
    up: Upstream,
    weight: Tensor,
    class_weights: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows [C, D] and biases [C] of a block.

    class_weights [C] where labels are smoothed; labels: sums of g y hidden [C, D] and g y [C] of a distribution.
    """
    hidden, objective = part.batch.hidden, part.objective
    found = kernel.block_columns(hidden, block, objective)
    dz = kernel.block_gradient(found, up.lse, up.g * weight, objective.family)
    gradient, bias = dz.T @ hidden, dz.sum(0)
    if class_weights is not None and part.batch.spread is not None:
        g = up.g * part.batch.spread
        gradient -= class_weights[:, None] * (g @ hidden)
        bias -= class_weights * g.sum()
    if labels is not None:
        gradient -= labels[0]
        bias -= labels[1]
    if block.norms is not None:
        gradient = project(gradient, block.rows, block.norms)
    return gradient, bias * objective.transform.scale


def dense_gradient(
    rows: ShardRows,
    parts: tuple[Part, ...],
    upstreams: tuple[Upstream, ...],
    touched: Touched,
    collected: Collected | None,
) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Gradient of every row, in chunks of rows: the parts over all classes plus what the columns touched.

    A chunk's logits depend on its own rows alone, so the caller may update a chunk before asking for the next.
    """
    full = [(part, up) for part, up in zip(parts, upstreams, strict=True) if part.is_full]
    row_index, touched_rows_, touched_biases = touched
    for start, end in rows.chunks(max(len(part.batch.hidden) for part, _ in full)):
        gradient = torch.zeros(end - start, rows.spec.dim, dtype=rows.compute_dtype)
        biases = torch.zeros(end - start, dtype=rows.compute_dtype)
        for part, up in full:
            _, block = columns.dense_block(rows, part, start, end)
            weights = None
            if part.batch.spread is not None:
                weights = columns.class_weights(rows, part, start, end).to(rows.compute_dtype)
            labels = labels_of(part, collected, start, end)
            piece = block_gradient(part, block, up, weight_of_columns(part, up.lse), weights, labels)
            gradient += piece[0]
            biases += piece[1]
        low, high = torch.searchsorted(row_index, torch.tensor([start, end])).tolist()
        gradient[row_index[low:high] - start] += touched_rows_[low:high]
        biases[row_index[low:high] - start] += touched_biases[low:high]
        yield slice(start, end), gradient, biases


def labels_of(part: Part, collected: Collected | None, start: int, end: int) -> tuple[Tensor, Tensor] | None:
    """What was collected for a range of rows, where the part's labels are a distribution.

    Raises:
        LookupError: another distribution was collected, or none; whoever orders work made a mistake.
    """
    if not part.distribution:
        return None
    if collected is None or collected.name != part.distribution:
        raise LookupError(f"label distribution {part.distribution!r} is not here")
    return collected.rows[start:end], collected.biases[start:end]


def weight_of_columns(part: Part, lse: Tensor) -> Tensor:
    """Factor of p in d loss / d z [N]: a softmax's by mass, lse and z-loss; 1 for a counted row of a logistic loss."""
    mass = part.batch.mass
    if part.objective.family == "logistic":
        return (mass != 0).to(mass.dtype)
    mass = mass_of_gradient(mass, part.objective.unit_mass_gradient)
    return weight_of_softmax(mass, lse, part.objective.z_loss)


def in_blocks(touched: Touched) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """Touched rows, BLOCK_ROWS at a time."""
    index, gradient, biases = touched
    for start in range(0, len(index), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        yield index[block], gradient[block], biases[block]
