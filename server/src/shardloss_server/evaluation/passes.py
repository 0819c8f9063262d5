"""Exact answers over all classes of a live table, computed slice by slice so that training goes on in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.evaluation.slices import (
    SLICE_ROWS,
    Scan,
    asked_rows,
    best_of,
    cat,
    drawn_block,
    drawn_of,
    folded,
    merged_lse,
    ranked_rows,
    sum_before,
    sum_softplus,
)
from shardloss_server.frontend import validate
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.numerics.gumbel import draw_keys
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import TableSpec
from shardloss_server.shard.scan import Drawn, Question, drawn

MAX_ROW_NUMBER = 1 << 62
DRAWN_NOISE = 1 << 20  # noise values generated between two checks of the deadline: a few milliseconds


@dataclass(frozen=True, slots=True)
class Ask:
    """The arguments common to all exact questions: table, hidden [N, D], logit transform and deadline."""

    table: str
    hidden: Tensor
    transform: Transform
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact results: loss [N] and sigmoid [N] in nats and compute dtype, rank [N] int64; None if not requested.

    version and last_version are the first and the last version of the table that the pass saw.
    """

    loss: Tensor
    rank: Tensor | None
    sigmoid: Tensor | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scored classes: class_ids [N, k], best first or as requested, logits [N, k], log_probs [N, k] or None."""

    class_ids: Tensor
    logits: Tensor
    log_probs: Tensor | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Draws:
    """A request for draws: num_samples S per row, by seed; rows are numbered from first_row.

    Classes are drawn among the top_k best of each row, or among all if top_k is None.
    """

    num_samples: int
    seed: int
    first_row: int
    top_k: int | None


@dataclass(frozen=True, slots=True)
class Samples:
    """Drawn classes: class_ids [N, S] in drawing order, log_probs [N, S] or None."""

    class_ids: Tensor
    log_probs: Tensor | None
    version: int
    last_version: int


class Evaluator:
    """The implementation of Evaluate, TopK, Score and SampleClasses."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self.catalog, self.limits = catalog, limits

    def evaluate(
        self, ask: Ask, labels: Tensor, *, ignore: int | None, want_rank: bool, want_sigmoid: bool
    ) -> Evaluation:
        """Compute exact negative log likelihood, rank and sigmoid cross-entropy of labels [N]; ignored rows get 0."""
        scan, spec = self._scan(ask)
        validate.label_list(labels, len(ask.hidden), spec.num_classes, ignore)
        labels = labels if ignore is None else torch.where(labels == ignore, -1, labels)
        losses, before, sigmoids = [], [], []
        for start in range(0, len(ask.hidden), SLICE_ROWS):
            rows, y = scan.hidden(ask.hidden[start : start + SLICE_ROWS]), labels[start : start + SLICE_ROWS]
            asked = scan.asked(rows, y[:, None])
            label_keys = asked.keys[:, 0] if want_rank else None
            question = Question(
                rows, y if want_rank else None, label_keys, 0, True, want_sigmoid, transform=ask.transform
            )
            answers = folded(scan.answers(question))
            losses.append(excess(merged_lse(answers), asked.logits[:, 0]))
            before.append(sum_before(answers, len(y)))
            if want_sigmoid:
                sigmoids.append(excess(sum_softplus(answers), asked.logits[:, 0]))
        counted = labels >= 0
        return Evaluation(
            scan.result(torch.where(counted, cat(losses), 0.0)),
            torch.where(counted, 1 + cat(before).long(), 0) if want_rank else None,
            scan.result(torch.where(counted, cat(sigmoids), 0.0)) if want_sigmoid else None,
            *scan.versions(),
        )

    def top_k(self, ask: Ask, k: int, want_log_probs: bool) -> Ranked:
        """Find the k best classes of each row, by logit descending, then id ascending."""
        scan, spec = self._scan(ask)
        check_k(k, "k", spec, self.limits)
        check_best(k, len(ask.hidden), self.limits)
        logits = [torch.zeros(0, k, dtype=torch.float64)]
        ids, log_probs = [logits[0].long()], list(logits)
        size = ranked_rows(k)
        for start in range(0, len(ask.hidden), size):
            rows = scan.hidden(ask.hidden[start : start + size])
            question = Question(rows, None, None, k, want_log_probs, transform=ask.transform)
            found, lse = best_of(scan.answers(question), k)
            ids.append(found.class_ids)
            logits.append(found.logits)
            log_probs.append(log_prob(found.logits, lse) if want_log_probs else found.logits)
        shown = scan.result(torch.cat(log_probs)) if want_log_probs else None
        return Ranked(torch.cat(ids), scan.result(torch.cat(logits)), shown, *scan.versions())

    def score(self, ask: Ask, class_ids: Tensor, want_log_probs: bool) -> Ranked:
        """Compute the logits of the requested classes [S] or [N, S]."""
        scan, spec = self._scan(ask)
        if class_ids.dim() == 1:
            validate.class_ids(class_ids, spec.num_classes, "class_ids")
            class_ids = class_ids.expand(len(ask.hidden), -1)
        check_asked(class_ids, ask.hidden, spec, self.limits)
        logits = [torch.zeros(0, class_ids.shape[1], dtype=torch.float64)]
        log_probs = list(logits)
        size = asked_rows(class_ids.shape[1], spec)
        for start in range(0, len(ask.hidden), size):
            rows = scan.hidden(ask.hidden[start : start + size])
            asked = scan.asked(rows, class_ids[start : start + size].contiguous()).logits
            logits.append(asked)
            if want_log_probs:
                question = Question(rows, None, None, 0, True, transform=ask.transform)
                log_probs.append(log_prob(asked, merged_lse(folded(scan.answers(question)))))
        shown = scan.result(torch.cat(log_probs)) if want_log_probs else None
        return Ranked(class_ids, scan.result(torch.cat(logits)), shown, *scan.versions())

    def sample(self, ask: Ask, draws: Draws, want_log_probs: bool) -> Samples:
        """Draw independent classes from the exact softmax of each row, or from the softmax over its best classes."""
        scan, spec = self._scan(ask)
        check_draws(draws, len(ask.hidden), spec, self.limits)
        keys = draw_keys(draws.seed, draws.first_row, len(ask.hidden), draws.num_samples)
        logits = [torch.zeros(0, draws.num_samples, dtype=torch.float64)]
        ids, log_probs = [logits[0].long()], list(logits)
        num_rows, _ = drawn_block(draws.num_samples, spec)
        num_rows = num_rows if draws.top_k is None else min(num_rows, ranked_rows(draws.top_k))
        for start in range(0, len(ask.hidden), num_rows):
            rows, these = scan.hidden(ask.hidden[start : start + num_rows]), keys[start : start + num_rows]
            if draws.top_k is None:
                found, lse = drawn_among_all(scan, rows, these, spec, want_log_probs)
            else:
                found, lse = drawn_among_best(scan, rows, these, draws.top_k)
            ids.append(found.class_ids)
            logits.append(found.logits)
            log_probs.append(log_prob(found.logits, lse) if want_log_probs else found.logits)
        scan.result(torch.cat(logits))
        shown = scan.result(torch.cat(log_probs)) if want_log_probs else None
        return Samples(torch.cat(ids), shown, *scan.versions())

    def _scan(self, ask: Ask) -> tuple[Scan, TableSpec]:
        """Validate hidden and transform; return a pass over the requested table, and its spec."""
        owner = self.catalog.owner(ask.table)
        validate.hidden(ask.hidden, owner.spec, self.limits)
        validate.transform(ask.transform, owner.spec)
        return Scan(self.catalog, owner, ask.transform, ask.deadline), owner.spec


def drawn_among_all(scan: Scan, rows: Tensor, keys: Tensor, spec: TableSpec, want_lse: bool) -> tuple[Drawn, Tensor]:
    """Return the winners of draws with keys [n, S] among all classes of rows [n, D], and lse [n] (0 if not wanted)."""
    _, size = drawn_block(keys.shape[1], spec)
    blocks = []
    for start in range(0, keys.shape[1], size):
        wanted = want_lse and start == 0
        question = Question(
            rows, None, None, 0, wanted, draws=keys[:, start : start + size].contiguous(), transform=scan.transform
        )
        blocks.append(drawn_of(scan.answers(question)))
    return side_by_side([found for found, _ in blocks]), blocks[0][1]


def drawn_among_best(scan: Scan, rows: Tensor, keys: Tensor, k: int) -> tuple[Drawn, Tensor]:
    """Return the winners of draws with keys [n, S] among the k best classes of rows [n, D], and lse [n] over these."""
    best, _ = best_of(scan.answers(Question(rows, None, None, k, False, transform=scan.transform)), k)
    blocks = []
    size = max(1, DRAWN_NOISE // (k * max(1, len(rows))))
    for start in range(0, keys.shape[1], size):
        scan.deadline.check("all draws were made")
        blocks.append(drawn(best.class_ids, best.logits, keys[:, start : start + size]))
    return side_by_side(blocks), torch.logsumexp(best.logits, 1)


def side_by_side(blocks: list[Drawn]) -> Drawn:
    """Concatenate blocks of draws into draws [n, S]."""
    return Drawn(
        torch.cat([block.class_ids for block in blocks], 1),
        torch.cat([block.scores for block in blocks], 1),
        torch.cat([block.logits for block in blocks], 1),
    )


def excess(total: Tensor, label_logits: Tensor) -> Tensor:
    """Return total - z_y [N], at least 0: total >= z_y except for rounding, and no loss is negative."""
    return (total - label_logits).clamp_(min=0)


def log_prob(logits: Tensor, lse: Tensor) -> Tensor:
    """Return logits [N, S] - lse [N], at most 0 despite rounding."""
    return (logits - lse[:, None]).clamp_(max=0)


def check_k(k: int, field: str, spec: TableSpec, limits: Limits) -> None:
    """Check that 1 <= k <= min(V, max_top_k)."""
    if not 1 <= k <= spec.num_classes:
        raise InvalidArgument(f"{field} = {k} must be from 1 to {spec.num_classes}, the number of classes", field=field)
    if k > limits.max_top_k:
        raise LimitExceeded(f"{field} = {k} exceeds max_top_k = {limits.max_top_k}", field=field)


def check_best(k: int, num_rows: int, limits: Limits) -> None:
    """Check that k ids, logits and log-probabilities per row fit in a message."""
    if 24 * k * num_rows > min(limits.max_message_bytes, limits.max_reply_bytes):
        raise LimitExceeded(f"{num_rows} rows of {k} classes do not fit in a message; send fewer rows", field="k")


def check_asked(class_ids: Tensor, hidden: Tensor, spec: TableSpec, limits: Limits) -> None:
    """Check that class_ids [N, S] are in range and that their answers fit the reply limit."""
    if class_ids.dim() != 2 or len(class_ids) != len(hidden):
        raise InvalidArgument(
            f"class_ids has shape {list(class_ids.shape)}; it must be [S] or [{len(hidden)}, S]", field="class_ids"
        )
    if 16 * class_ids.numel() > min(limits.max_message_bytes, limits.max_reply_bytes):
        raise LimitExceeded(f"{class_ids.numel()} logits do not fit in a message; request fewer", field="class_ids")
    validate.answered_bytes(class_ids.shape[1] * spec.placement.num_shards * 16, "class_ids", limits)
    validate.class_ids(class_ids, spec.num_classes, "class_ids")


def check_draws(draws: Draws, num_rows: int, spec: TableSpec, limits: Limits) -> None:
    """Check that there is at least one draw per row, that all fit the reply limit, and that row numbers fit 64 bits.

    For the reply limit, an empty batch counts as one row.
    """
    validate.at_least(draws.num_samples, 1, "num_samples")
    if 16 * draws.num_samples * max(1, num_rows) > min(limits.max_message_bytes, limits.max_reply_bytes):
        raise LimitExceeded(
            f"{num_rows} rows of {draws.num_samples} draws do not fit in a message; request fewer", field="num_samples"
        )
    validate.at_least(draws.first_row, 0, "first_row")
    if draws.first_row >= MAX_ROW_NUMBER:
        raise InvalidArgument(f"first_row = {draws.first_row} must be below 2^62", field="first_row")
    if draws.top_k is not None:
        check_k(draws.top_k, "top_k", spec, limits)
