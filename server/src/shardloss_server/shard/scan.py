"""Exact questions over a slice of a shard's rows: log-sum-exp, rank of a label, best classes, draws, given logits.

Logits are computed in float64. Their last bits depend on the position of a row in the matrix, so for every comparison
they are rounded to a **key**: a multiple of 2^-24 (2^-33 in a float64 table) of |hidden| |row| or of |bias|, whichever
is larger, each rounded up to the next power of two. Equal rows have equal keys on any shard and in any slice, and
logits with the same key count as tied. See docs/adr/0002.

Keys are computed from hidden . row + bias (of unit vectors, if the transform normalises). Scale and soft cap preserve
the order of logits, but in floating point they could make different logits equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardloss_server.numerics import gumbel
from shardloss_server.numerics.ranking import Best, best
from shardloss_server.numerics.transform import Transform, cap_, norms_of
from shardloss_server.shard.table import ShardTable

ASKED_ELEMENTS = 1 << 20  # elements of requested rows gathered at once
KEY_BITS = {torch.float32: 24, torch.float64: 33}
MOST_POWER = 2.0**1023  # the largest power of two
MOST_MAGIC = 1.5 * 2.0**1022  # logits that need a larger one would overflow when it is added
PLAIN = Transform()


@dataclass(frozen=True, slots=True)
class Question:
    """The answers requested for hidden [N, D].

    labels [N] (-1: no label) with label_keys [N] request the number of classes that rank before the label; k > 0
    requests the k best classes; with_lse the log-sum-exp; with_softplus the sum of log(1 + exp(z)); draws [N, S], from
    `gumbel.draw_keys`, the winner of each draw.
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

    If there are no classes, the id is -1 and the score -inf.
    """

    class_ids: Tensor
    scores: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class ScanAnswer:
    """The answers over one slice: lse and softplus [N] float64, num_before [N], ...; None if not requested."""

    version: int
    lse: Tensor | None
    num_before: Tensor | None
    best: Best | None
    softplus: Tensor | None = None
    drawn: Drawn | None = None


@dataclass(frozen=True, slots=True)
class AskedLogits:
    """Logits and keys [N, S] float64 of requested classes; 0 for classes of other shards, so that shards add up."""

    logits: Tensor
    keys: Tensor
    version: int


def power_above(values: Tensor) -> Tensor:
    """Return the power of two above each |value|, at most twice as large; 0 for 0, and never above MOST_POWER."""
    return torch.where(values == 0, 0.0, torch.exp2(torch.frexp(values).exponent.double()).clamp_(max=MOST_POWER))


def norms(values: Tensor) -> Tensor:
    """Return |value| [M] of values [M, D], rounded up to the next power of two; the same bits for equal rows.

    Each row is scaled by its largest entry, so that squares neither overflow nor vanish. A norm that is 1 up to
    rounding, as that of a unit vector, is 1.
    """
    largest = power_above(values.abs().amax(1)) / 2
    scaled = values / torch.where(largest == 0, 1.0, largest)[:, None]
    return (power_above(torch.linalg.vector_norm(scaled, dim=1) * (1 - 2.0**-40)) * largest).clamp_(max=MOST_POWER)


def directions(vectors: Tensor, transform: Transform) -> Tensor:
    """Return vectors [M, D] float64, as unit vectors if the transform normalises; equal vectors get the same bits."""
    if not transform.normalize:
        return vectors
    bounded = vectors / vectors.abs().amax(1, keepdim=True).clamp_(min=1.0)  # so that its norm is finite
    return bounded / norms_of(bounded)[:, None]


def transformed(raw: Tensor, transform: Transform) -> Tensor:
    """Return cap(scale * raw); nan for raw values that are not finite, which a cap would hide."""
    logits = raw if transform.scale == 1.0 else raw * transform.scale
    if transform.soft_cap is None:
        return logits
    capped = cap_(logits.clone() if logits is raw else logits, transform.soft_cap)
    return capped if torch.isfinite(raw.sum()) else capped.masked_fill_(~torch.isfinite(raw), torch.nan)


def magic_of(hidden_norms: Tensor, rows: Tensor, biases: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number whose addition and subtraction rounds a logit to its grid: 1.5 * 2^52 steps of 2^-bits * scale.

    The scale is the magnitude of the logit's terms: |hidden| |row| or |bias|, whichever is larger. Beyond 1e302 there
    is only one grid, that of MOST_MAGIC, so a key is never nan if its logit is finite.
    """
    steps = 1.5 * 2.0 ** (52 - KEY_BITS[dtype])
    of_hidden, of_biases = ((steps * size).clamp_(max=MOST_MAGIC) for size in (hidden_norms, power_above(biases)))
    return torch.clamp(of_hidden * norms(rows), of_biases, torch.tensor(MOST_MAGIC, dtype=torch.float64))


def log_sum_exp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the log-sum-exp [N] of float64 logits [N, R], with exponentials in dtype; -inf if R = 0."""
    if logits.shape[1] == 0:
        return torch.full((len(logits),), -torch.inf, dtype=torch.float64)
    top = logits.amax(1)
    return top + (logits - top[:, None]).to(dtype).exp_().sum(1).double().log()


def keys_of(logits: Tensor, magic: Tensor) -> Tensor:
    """Round logits to their grids."""
    return (logits + magic).sub_(magic)


def sum_softplus(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of log(1 + exp(z)) [N] in float64 over logits [N, R] float64, with log1p(exp(-|z|)) in dtype."""
    small = logits.abs().neg_().to(dtype).exp_().log1p_()
    return logits.clamp(min=0).sum(1) + small.sum(1, dtype=torch.float64)


def asked_logits(table: ShardTable, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN) -> AskedLogits:
    """Return the logits and keys of those class_ids [N, S] that this shard owns, and 0 for the others."""
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
    """Answer a question over slice number piece of num_pieces slices of the shard's rows."""
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
        if not torch.isfinite(raw.sum()):  # nan ranks first, so that the front end finds it and refuses it
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
    """Return the winners of draws [N, S] among class_ids, [R] or [N, R], with logits [N, R]; nan if a row has any."""
    if logits.shape[1] == 0:
        nothing = torch.zeros(draws.shape, dtype=torch.float64)
        return Drawn(torch.full_like(draws, -1), nothing - torch.inf, nothing)
    each = class_ids if class_ids.dim() == 2 else class_ids[None]
    scores, column = gumbel.race(logits, each, draws)
    won = logits.gather(1, column).masked_fill_(scores.isnan(), torch.nan)
    return Drawn(each.expand(len(draws), -1).gather(1, column), scores, won)


def count_before(class_ids: Tensor, keys: Tensor, labels: Tensor, label_keys: Tensor) -> Tensor:
    """Return #{z > z_y} + #{z = z_y, id < y} [N] over one slice: class_ids [R], keys [N, R]."""
    z_y, y = label_keys[:, None], labels[:, None]
    before = (keys > z_y) | ((keys == z_y) & (class_ids < y))
    return (before & (class_ids != y)).sum(1)
