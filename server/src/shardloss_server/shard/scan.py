"""Exact questions over a slice of a shard's rows: log-sum-exp, rank of a label, best classes, draws, asked logits.

Logits are formed in float64. Their last bits depend on where a row stands in the matrix, so for every comparison they
are rounded to a **key**: a multiple of 2^-24 (2^-33 in a float64 table) of |hidden| |row| or of |bias|, whichever is
larger, all taken up to the next power of two. Equal rows have equal keys on any shard and in any slice, and logits
with the same key count as tied. See docs/adr/0002.

Keys are of hidden . row + bias (of unit vectors, where these are asked for): scale and soft cap keep their order, and
would make equal, in floating point, what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics import gumbel
from shardloss_server.numerics.ranking import Best, best
from shardloss_server.numerics.transform import Transform, cap_, norms_of
from shardloss_server.shard.table import ShardTable

ASKED_ELEMENTS = 1 << 20  # elements of asked rows held at once
KEY_BITS = {torch.float32: 24, torch.float64: 33}
MOST_POWER = 2.0**1023  # the largest power of two
MOST_MAGIC = 1.5 * 2.0**1022  # what a larger one would round to its grid overflows beside it
PLAIN = Transform()


@dataclass(frozen=True, slots=True)
class Question:
    """What to answer for hidden [N, D].

    labels [N] (-1: no label) with label_keys [N] ask for the number of classes that stand before the label; k > 0 asks
    for the k best; with_lse for the log-sum-exp; with_softplus for the sum of log(1 + exp(z)); draws [N, S], of
    `gumbel.draw_keys`, for the winner of each draw.
    """

    hidden: Tensor
    labels: Tensor | None
    label_keys: Tensor | None
    k: int
    with_lse: bool
    with_softplus: bool = False
    draws: Tensor | None = None
    transform: Transform = PLAIN


@dataclass(frozen=True, slots=True)
class Drawn:
    """The winners of draws among some classes: class_ids, scores (logit + noise) and logits, each [N, S].

    Among no classes: id -1 and score -inf.
    """

    class_ids: Tensor
    scores: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class ScanAnswer:
    """The answers over one slice: lse and softplus [N] float64, num_before [N], ...; None where not asked."""

    version: int
    lse: Tensor | None
    num_before: Tensor | None
    best: Best | None
    softplus: Tensor | None = None
    drawn: Drawn | None = None


@dataclass(frozen=True, slots=True)
class AskedLogits:
    """Logits and keys [N, S] float64 of asked classes: a shard's own, 0 for all others, so that shards sum up."""

    logits: Tensor
    keys: Tensor
    version: int


def power_above(values: Tensor) -> Tensor:
    """The power of two above each value's size, at most twice it; 0 for 0, MOST_POWER for what is larger."""
    return torch.where(values == 0, 0.0, torch.exp2(torch.frexp(values).exponent.double()).clamp_(max=MOST_POWER))


def norms(values: Tensor) -> Tensor:
    """|value| [M] of values [M, D], up to the next power of two; the same bits for equal rows.

    Scaled by each row's largest entry, so that its squares neither overflow nor vanish. A norm of 1 to
    rounding, as unit vectors have, is 1.
    """
    largest = power_above(values.abs().amax(1)) / 2
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None]
    return (power_above(torch.linalg.vector_norm(scaled, dim=1) * (1 - 2.0**-40)) * largest).clamp_(max=MOST_POWER)


def directions(vectors: Tensor, transform: Transform) -> Tensor:
    """Unit vectors of [M, D] float64 where the transform normalizes, else the vectors; the same bits for equal ones."""
    if not transform.normalize:
        return vectors
    bounded = vectors / vectors.abs().amax(1, keepdim=True).clamp_(min=1.0)  # so that its norm is finite
    return bounded / norms_of(bounded)[:, None]


def transformed(raw: Tensor, transform: Transform) -> Tensor:
    """cap(scale * raw); nan where raw is not finite, which a cap would hide."""
    logits = raw if transform.scale == 1.0 else raw * transform.scale
    if transform.soft_cap is None:
        return logits
    capped = cap_(logits.clone() if logits is raw else logits, transform.soft_cap)
    return capped if torch.isfinite(raw.sum()) else capped.masked_fill_(~torch.isfinite(raw), torch.nan)


def magic_of(hidden_norms: Tensor, rows: Tensor, biases: Tensor, dtype: torch.dtype) -> Tensor:
    """What added to a logit, and subtracted again, rounds it to its grid: 1.5 * 2^52 steps of 2^-bits * scale.

    The scale is the size of what the logit is the sum of: |hidden| |row| or |bias|, whichever is larger. Beyond 1e302
    there is one grid, that of MOST_MAGIC: a key is never nan where its logit is finite.
    """
    steps = 1.5 * 2.0 ** (52 - KEY_BITS[dtype])
    of_hidden, of_biases = ((steps * size).clamp_(max=MOST_MAGIC) for size in (hidden_norms, power_above(biases)))
    return torch.clamp(of_hidden * norms(rows), of_biases, torch.tensor(MOST_MAGIC, dtype=torch.float64))


def log_sum_exp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-sum-exp [N] of float64 logits [N, R], its exponentials in dtype; -inf where R = 0."""
    if logits.shape[1] == 0:
        return torch.full((len(logits),), -torch.inf, dtype=torch.float64)
    top = logits.amax(1)
    return top + (logits - top[:, None]).to(dtype).exp_().sum(1).double().log()


def keys_of(logits: Tensor, magic: Tensor) -> Tensor:
    """Logits rounded to their grids."""
    return (logits + magic).sub_(magic)


def sum_softplus(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of log(1 + exp(z)) [N] in float64 over logits [N, R] float64; log1p(exp(-|z|)) is formed in dtype."""
    small = logits.abs().neg_().to(dtype).exp_().log1p_()
    return logits.clamp(min=0).sum(1) + small.sum(1, dtype=torch.float64)


def asked_logits(table: ShardTable, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN) -> AskedLogits:
    """Logits and keys of class_ids [N, S] that this shard owns."""
    logits, keys = (torch.zeros(class_ids.shape, dtype=torch.float64) for _ in range(2))
    batch_row, column = torch.nonzero(table.spec.placement.owned(table.shard, class_ids), as_tuple=True)
    hidden = directions(hidden.double(), transform)
    hidden_norms = norms(hidden)
    size = max(1, ASKED_ELEMENTS // table.spec.dim)
    for n, s in zip(torch.split(batch_row, size), torch.split(column, size), strict=True):
        index = table.spec.placement.rows(table.shard, class_ids[n, s])
        rows, biases = directions(table.weights[index].double(), transform), table.biases[index].double()
        values = (rows * hidden[n]).sum(1) + biases
        logits[n, s] = transformed(values, transform)
        keys[n, s] = keys_of(values, magic_of(hidden_norms[n], rows, biases, table.compute_dtype))
    return AskedLogits(logits, keys, table.version)


def answer(table: ShardTable, question: Question, piece: int, num_pieces: int) -> ScanAnswer:
    """Answer over the piece-th of num_pieces slices of the shard's rows."""
    start = table.num_rows * piece // num_pieces
    end = table.num_rows * (piece + 1) // num_pieces
    class_ids, rows, biases = table.dense_rows(start, end)
    rows, biases = directions(rows.double(), question.transform), biases.double()
    hidden = directions(question.hidden.double(), question.transform)
    raw = torch.addmm(biases, hidden, rows.T)
    logits = transformed(raw, question.transform)
    num_before = found = None
    if question.k or question.labels is not None:
        keys = keys_of(raw, magic_of(norms(hidden)[:, None], rows, biases, table.compute_dtype))
        if not torch.isfinite(raw.sum()):  # nan comes first of all, so that whoever asked finds it and refuses it
            keys[keys.isnan()] = torch.inf
        if question.labels is not None and question.label_keys is not None:
            num_before = count_before(class_ids, keys, question.labels, question.label_keys)
        if question.k:
            found = best(class_ids, keys, logits, question.k)
    return ScanAnswer(
        table.version,
        log_sum_exp(logits, table.compute_dtype) if question.with_lse else None,
        num_before,
        found,
        sum_softplus(logits, table.compute_dtype) if question.with_softplus else None,
        None if question.draws is None else drawn(class_ids, logits, question.draws),
    )


def drawn(class_ids: Tensor, logits: Tensor, draws: Tensor) -> Drawn:
    """The winners of draws [N, S] among class_ids [R], shared, or [N, R], with logits [N, R]; nan in a row with any."""
    if logits.shape[1] == 0:
        nothing = torch.zeros(draws.shape, dtype=torch.float64)
        return Drawn(torch.full_like(draws, -1), nothing - torch.inf, nothing)
    each = class_ids if class_ids.dim() == 2 else class_ids[None]
    scores, column = gumbel.race(logits, each, draws)
    won = logits.gather(1, column).masked_fill_(scores.isnan(), torch.nan)
    return Drawn(each.expand(len(draws), -1).gather(1, column), scores, won)


def count_before(class_ids: Tensor, keys: Tensor, labels: Tensor, label_keys: Tensor) -> Tensor:
    """#{z > z_y} + #{z = z_y, id < y} [N] over one slice: class_ids [R], keys [N, R]."""
    z_y, y = label_keys[:, None], labels[:, None]
    before = (keys > z_y) | ((keys == z_y) & (class_ids < y))
    return (before & (class_ids != y)).sum(1)
