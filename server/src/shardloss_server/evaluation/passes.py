"""Exact answers over all classes of a live table, asked slice by slice so that training goes on between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.frontend import validate
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.numerics.ranking import Best, beside, ordered
from shardloss_server.shard.record import TableSpec
from shardloss_server.shard.scan import AskedLogits, Question, ScanAnswer

SLICE_MACS = 1 << 28  # multiply-adds of one slice on one worker: about 30 ms of float64 on one core
SLICE_GATHERED = 1 << 22  # elements of asked rows of one slice: a gathered one costs as much as 64 multiply-adds
SLICE_LOGITS = 1 << 22  # asked logits that all shards answer at once: 64 MiB
LOGIT_MACS = 64  # what a logit costs beside its product: exponential, key, comparisons
SLICE_ROWS = 512  # rows of hidden a slice takes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """loss [N] nats, rank [N] int64 or None, in compute dtype; versions at the first and last slice."""

    loss: Tensor
    rank: Tensor | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """class_ids [N, k] best first (or as asked), logits [N, k], log_probs [N, k] or None."""

    class_ids: Tensor
    logits: Tensor
    log_probs: Tensor | None
    version: int
    last_version: int


class Evaluator:
    """Answers Evaluate, TopK and Score."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self.catalog, self.limits = catalog, limits

    def evaluate(
        self, table: str, hidden: Tensor, labels: Tensor, ignore: int | None, want_rank: bool, deadline: Deadline
    ) -> Evaluation:
        """Exact negative log likelihood and rank of labels [N]; ignored rows get 0."""
        owner = self.catalog.owner(table)
        validate.hidden(hidden, owner.spec, self.limits)
        validate.label_list(labels, len(hidden), owner.spec.num_classes, ignore)
        labels = labels if ignore is None else torch.where(labels == ignore, -1, labels)
        scan = Scan(self.catalog, owner, deadline)
        lse, before, label_logits = [], [], []
        for start in range(0, len(hidden), SLICE_ROWS):
            rows, y = scan.hidden(hidden[start : start + SLICE_ROWS]), labels[start : start + SLICE_ROWS]
            asked = scan.asked(rows, y[:, None])
            question = Question(rows, y if want_rank else None, asked.keys[:, 0] if want_rank else None, 0, True)
            answers = list(scan.answers(question))
            lse.append(merged_lse(answers))
            label_logits.append(asked.logits[:, 0])
            before.append(sum_before(answers, len(y)))
        counted = labels >= 0
        loss = torch.where(counted, cat(lse) - cat(label_logits), 0.0)
        rank = torch.where(counted, 1 + cat(before).long(), 0) if want_rank else None
        return Evaluation(scan.result(loss), rank, *scan.versions())

    def top_k(self, table: str, hidden: Tensor, k: int, want_log_probs: bool, deadline: Deadline) -> Ranked:
        """The k best classes of each row: logit descending, then id ascending."""
        owner = self.catalog.owner(table)
        validate.hidden(hidden, owner.spec, self.limits)
        check_k(k, len(hidden), owner.spec, self.limits)
        scan = Scan(self.catalog, owner, deadline)
        logits = [torch.zeros(0, k, dtype=torch.float64)]
        ids, log_probs = [logits[0].long()], list(logits)
        for start in range(0, len(hidden), SLICE_ROWS):
            rows = scan.hidden(hidden[start : start + SLICE_ROWS])
            found, lse = best_of(scan.answers(Question(rows, None, None, k, want_log_probs)), k)
            ids.append(found.class_ids)
            logits.append(found.logits)
            log_probs.append(found.logits - lse[:, None] if want_log_probs else found.logits)
        shown = scan.result(torch.cat(log_probs)) if want_log_probs else None
        return Ranked(torch.cat(ids), scan.result(torch.cat(logits)), shown, *scan.versions())

    def score(self, table: str, hidden: Tensor, class_ids: Tensor, want_log_probs: bool, deadline: Deadline) -> Ranked:
        """Logits of asked classes [S] or [N, S]."""
        owner = self.catalog.owner(table)
        validate.hidden(hidden, owner.spec, self.limits)
        if class_ids.dim() == 1:
            validate.class_ids(class_ids, owner.spec.num_classes, "class_ids")
            class_ids = class_ids.expand(len(hidden), -1)
        check_asked(class_ids, hidden, owner.spec, self.limits)
        scan = Scan(self.catalog, owner, deadline)
        logits = [torch.zeros(0, class_ids.shape[1], dtype=torch.float64)]
        log_probs = list(logits)
        size = asked_rows(class_ids.shape[1], owner.spec)
        for start in range(0, len(hidden), size):
            rows = scan.hidden(hidden[start : start + size])
            asked = scan.asked(rows, class_ids[start : start + size].contiguous()).logits
            logits.append(asked)
            if want_log_probs:
                lse = merged_lse(list(scan.answers(Question(rows, None, None, 0, True))))
                log_probs.append(asked - lse[:, None])
        shown = scan.result(torch.cat(log_probs)) if want_log_probs else None
        return Ranked(class_ids, scan.result(torch.cat(logits)), shown, *scan.versions())


def asked_rows(num_asked: int, spec: TableSpec) -> int:
    """Rows of hidden whose asked classes are one slice of work, and of answers from all shards."""
    num_asked = max(1, num_asked)
    by_work = SLICE_GATHERED // (num_asked * spec.dim)
    by_answer = SLICE_LOGITS // (num_asked * spec.placement.num_shards)
    return max(1, min(SLICE_ROWS, by_work, by_answer))


class Scan:
    """One pass over a table: asks every slice in turn and remembers which versions it saw."""

    def __init__(self, catalog: Catalog, owner: TableOwner, deadline: Deadline) -> None:
        self._group, self._owner, self._deadline = catalog.group, owner, deadline
        self._dtype: torch.dtype = getattr(torch, owner.spec.compute_dtype)
        self._seen: list[int] = []

    def hidden(self, rows: Tensor) -> Tensor:
        """Hidden in compute dtype, a copy of its own."""
        return rows.to(self._dtype).clone()

    def result(self, values: Tensor) -> Tensor:
        """float64 results [N, ...] in compute dtype.

        Raises:
            InvalidArgument: a row of hidden has logits that are not finite.
        """
        values = values.to(self._dtype)
        validate.finite_logits(torch.isfinite(values), "hidden")
        return values

    def answers(self, question: Question) -> Iterator[ScanAnswer]:
        """Answers of every shard over every slice, in slice and shard order."""
        spec = self._owner.spec
        rows_a_shard = spec.placement.num_rows(0)
        shards_a_worker = -(-spec.placement.num_shards // max(1, self._group.num_workers))
        macs = max(1, len(question.hidden)) * (spec.dim + LOGIT_MACS) * rows_a_shard * shards_a_worker
        num_pieces = max(1, min(-(-macs // SLICE_MACS), rows_a_shard))
        for piece in range(num_pieces):
            answers = self._owner.ask(
                lambda piece=piece: self._group.scan(self._owner.key, question, piece, num_pieces),  # type: ignore[misc]
                self._deadline,
            )
            self._seen.append(self._owner.same_version([answer.version for answer in answers]))
            yield from answers

    def asked(self, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
        """Logits and keys of class_ids [N, S]; 0 for padding."""
        start = lambda: self._group.asked_logits(self._owner.key, hidden, class_ids)  # noqa: E731
        answers = self._owner.ask(start, self._deadline)
        version = self._owner.same_version([a.version for a in answers])
        self._seen.append(version)
        return AskedLogits(sum_of([a.logits for a in answers]), sum_of([a.keys for a in answers]), version)

    def versions(self) -> tuple[int, int]:
        """The first and last version seen."""
        seen = self._seen or [self._owner.version]
        return seen[0], seen[-1]


def cat(pieces: list[Tensor]) -> Tensor:
    """Concatenate pieces [n_i]; [0] for none."""
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def sum_of(pieces: list[Tensor]) -> Tensor:
    """Sum of at least one tensor of one shape."""
    return torch.stack(pieces).sum(0)


def best_of(answers: Iterable[ScanAnswer], k: int) -> tuple[Best, Tensor]:
    """The k best over all slices, and their lse [N] (0 where it was not asked for), folded as they come."""
    found: Best | None = None
    lse = torch.zeros(())
    for answer in answers:
        assert answer.best is not None
        found = answer.best if found is None else ordered(beside(found, answer.best), k)
        if answer.lse is not None:
            lse = answer.lse if lse.dim() == 0 else torch.logaddexp(lse, answer.lse)
    assert found is not None
    return ordered(found, k), lse


def merged_lse(answers: list[ScanAnswer]) -> Tensor:
    """Log-sum-exp over slices [N]."""
    return torch.logsumexp(torch.stack([answer.lse for answer in answers if answer.lse is not None]), 0)


def sum_before(answers: list[ScanAnswer], num_rows: int) -> Tensor:
    """Number of classes before the label over slices [N]."""
    counts = [answer.num_before for answer in answers if answer.num_before is not None]
    return torch.stack(counts).sum(0) if counts else torch.zeros(num_rows, dtype=torch.int64)


def check_k(k: int, num_rows: int, spec: TableSpec, limits: Limits) -> None:
    """1 <= k <= min(V, max_top_k), and the reply fits one message."""
    if not 1 <= k <= spec.num_classes:
        raise InvalidArgument(f"k = {k} is outside [1, {spec.num_classes}]", field="k")
    if k > limits.max_top_k:
        raise LimitExceeded(f"k = {k} exceeds max_top_k = {limits.max_top_k}", field="k")
    if 24 * k * num_rows > min(limits.max_message_bytes, limits.max_reply_bytes):
        raise LimitExceeded(f"{num_rows} rows of {k} classes exceed one message; ask for fewer rows", field="k")


def check_asked(class_ids: Tensor, hidden: Tensor, spec: TableSpec, limits: Limits) -> None:
    """[N, S] ids in range, within the reply limit."""
    if class_ids.dim() != 2 or len(class_ids) != len(hidden):
        raise InvalidArgument(
            f"class_ids has shape {list(class_ids.shape)}; [S] or [{len(hidden)}, S] is needed", field="class_ids"
        )
    if 16 * class_ids.numel() > min(limits.max_message_bytes, limits.max_reply_bytes):
        raise LimitExceeded(f"{class_ids.numel()} logits exceed one message; ask for fewer", field="class_ids")
    validate.answered_bytes(class_ids.shape[1] * spec.placement.num_shards * 16, "class_ids", limits)
    validate.class_ids(class_ids, spec.num_classes, "class_ids")
