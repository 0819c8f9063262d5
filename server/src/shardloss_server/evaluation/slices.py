"""One pass over a live table: a question is cut into slices, with training in between, and the answers are merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from shardloss_server.frontend import validate
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.meter import meter, products
from shardloss_server.frontend.owner import TableOwner
from shardloss_server.numerics.ranking import Best, beside, ordered
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import TableSpec
from shardloss_server.shard.scan import AskedLogits, Drawn, Question, ScanAnswer

SLICE_MACS = 1 << 28  # multiply-adds of one slice on one worker: about 30 ms of float64 on one core
SLICE_GATHERED = 1 << 22  # elements of rows gathered in one slice; each costs as much as 64 multiply-adds
SLICE_LOGITS = 1 << 22  # requested logits, or draws, that all shards answer at once: 64 MiB
SLICE_DRAWS = 1 << 16  # draws in one slice: a few milliseconds even with a single class
LOGIT_MACS = 64  # a logit besides its product: exponential, key, comparisons; a cap or a softplus costs as much
DRAW_MACS = 128  # the noise of one class in one draw: 7 ns, more in fresh memory
ROW_MACS = 64  # an element of a table row, even for few rows of hidden: fresh memory, float64, norm
UNIT_MACS = 64  # the same element, in addition, if it is normalized
SLICE_BEST = 1 << 17  # best classes that one slice sorts: 20 ms, however small its other work
SLICE_ROWS = 512  # most rows of hidden in one slice


def macs_a_class(question: Question, dim: int) -> int:
    """Return the cost of one class in a scan, in multiply-adds."""
    transform = question.transform
    passes = 1 + (transform.soft_cap is not None) + question.with_softplus
    num_draws = 0 if question.draws is None else question.draws.numel()
    row_macs = ROW_MACS + UNIT_MACS * transform.normalize
    return len(question.hidden) * (dim + passes * LOGIT_MACS) + num_draws * DRAW_MACS + dim * row_macs


def asked_rows(num_asked: int, spec: TableSpec) -> int:
    """Return how many rows of hidden fit in one slice, both in gathered elements and in answers from all shards."""
    num_asked = max(1, num_asked)
    by_work = SLICE_GATHERED // (num_asked * spec.dim)
    by_answer = SLICE_LOGITS // (num_asked * spec.placement.num_shards)
    return max(1, min(SLICE_ROWS, by_work, by_answer))


def asked_classes(num_rows: int, spec: TableSpec) -> int:
    """Return how many requested classes per row fit in one slice of work, for num_rows rows of hidden."""
    return max(1, SLICE_GATHERED // (max(1, num_rows) * spec.dim))


def ranked_rows(k: int) -> int:
    """Return the number of rows of hidden whose k best classes one slice finds."""
    return max(1, min(SLICE_ROWS, SLICE_BEST // k))


def drawn_block(num_samples: int, spec: TableSpec) -> tuple[int, int]:
    """Return how many rows of hidden, and how many draws of each, fit in one slice."""
    most = max(1, min(SLICE_DRAWS, SLICE_LOGITS // spec.placement.num_shards))
    return max(1, min(SLICE_ROWS, most // num_samples)), min(num_samples, most)


class Scan:
    """One pass over a table, which queries slice after slice and records the versions it saw."""

    def __init__(self, catalog: Catalog, owner: TableOwner, transform: Transform, deadline: Deadline) -> None:
        self._group, self._owner, self._deadline = catalog.group, owner, deadline
        self._dtype: torch.dtype = getattr(torch, owner.spec.compute_dtype)
        self._seen: list[int] = []
        self.transform, self.deadline = transform, deadline

    def hidden(self, rows: Tensor) -> Tensor:
        """Return a copy of rows of hidden, in compute dtype."""
        return rows.to(self._dtype).clone()

    def result(self, values: Tensor) -> Tensor:
        """Convert float64 results [N, ...] to compute dtype.

        Raises:
            InvalidArgument: a row of hidden has logits that are not finite.
        """
        values = values.to(self._dtype)
        validate.finite_logits(torch.isfinite(values), "hidden")
        return values

    def answers(self, question: Question) -> Iterator[ScanAnswer]:
        """Yield the answers of every shard over every slice, in slice order and, within a slice, in shard order."""
        spec = self._owner.spec
        rows_a_shard = spec.placement.num_rows(0)
        shards_a_worker = -(-spec.placement.num_shards // max(1, self._group.num_workers))
        macs = macs_a_class(question, spec.dim) * rows_a_shard * shards_a_worker
        num_pieces = max(1, min(-(-macs // SLICE_MACS), rows_a_shard))
        meter().flops += products(len(question.hidden) * spec.num_classes, spec)
        for piece in range(num_pieces):
            answers = self._owner.ask(
                lambda piece=piece: self._group.scan(self._owner.key, question, piece, num_pieces),  # type: ignore[misc]
                self._deadline,
            )
            self._seen.append(self._owner.same_version([answer.version for answer in answers]))
            yield from answers

    def asked(self, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
        """Return the logits and keys of class_ids [N, S]; 0 for padding."""
        size = asked_classes(len(hidden), self._owner.spec)
        pieces = [self._asked(hidden, ids.contiguous()) for ids in torch.split(class_ids, size, dim=1)]
        logits, keys = ([getattr(piece, name) for piece in pieces] for name in ("logits", "keys"))
        return AskedLogits(torch.cat(logits, 1), torch.cat(keys, 1), pieces[-1].version)

    def _asked(self, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
        """Return the logits and keys of class_ids [N, S] that fit in one slice."""
        start = lambda: self._group.asked_logits(self._owner.key, hidden, class_ids, self.transform)  # noqa: E731
        answers = self._owner.ask(start, self._deadline)
        meter().flops += products(class_ids.numel(), self._owner.spec)
        version = self._owner.same_version([a.version for a in answers])
        self._seen.append(version)
        return AskedLogits(sum_of([a.logits for a in answers]), sum_of([a.keys for a in answers]), version)

    def versions(self) -> tuple[int, int]:
        """Return the first and the last version seen, or the current version twice if no slice was queried."""
        seen = self._seen or [self._owner.steps.version]
        return seen[0], seen[-1]


def cat(pieces: list[Tensor]) -> Tensor:
    """Concatenate pieces [n_i]; no pieces give an empty tensor [0]."""
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def sum_of(pieces: list[Tensor]) -> Tensor:
    """Return the sum of one or more tensors of the same shape."""
    return torch.stack(pieces).sum(0)


def folded(answers: Iterable[ScanAnswer]) -> list[ScanAnswer]:
    """Fold answers into a list of one as they arrive, because a big table has tens of thousands."""
    return [reduce(of_both, answers)]


def of_both(a: ScanAnswer, b: ScanAnswer) -> ScanAnswer:
    """Merge two answers into one over the classes of both, without best and drawn (see `best_of` and `drawn_of`)."""
    return ScanAnswer(
        b.version,
        None if a.lse is None or b.lse is None else torch.logaddexp(a.lse, b.lse),
        None if a.num_before is None or b.num_before is None else a.num_before + b.num_before,
        None,
        None if a.softplus is None or b.softplus is None else a.softplus + b.softplus,
    )


def best_of(answers: Iterable[ScanAnswer], k: int) -> tuple[Best, Tensor]:
    """Fold answers as they arrive into the k best over all slices, and their lse [N] (0 if not requested)."""
    found: Best | None = None
    lse = torch.zeros(())
    for answer in answers:
        assert answer.best is not None
        found = answer.best if found is None else ordered(beside(found, answer.best), k)
        if answer.lse is not None:
            lse = answer.lse if lse.dim() == 0 else torch.logaddexp(lse, answer.lse)
    assert found is not None
    return ordered(found, k), lse


def drawn_of(answers: Iterable[ScanAnswer]) -> tuple[Drawn, Tensor]:
    """Fold answers as they arrive into the winners over all slices, and their lse [N] (0 if not requested)."""
    found: Drawn | None = None
    lse = torch.zeros(())
    for answer in answers:
        assert answer.drawn is not None
        found = answer.drawn if found is None else winners(found, answer.drawn)
        if answer.lse is not None:
            lse = answer.lse if lse.dim() == 0 else torch.logaddexp(lse, answer.lse)
    assert found is not None
    return found, lse


def winners(a: Drawn, b: Drawn) -> Drawn:
    """Return the winner of each draw with the higher score of two; nan wins, and is rejected later."""
    wins = (b.scores > a.scores) | b.scores.isnan()
    return Drawn(
        torch.where(wins, b.class_ids, a.class_ids),
        torch.where(wins, b.scores, a.scores),
        torch.where(wins, b.logits, a.logits),
    )


def merged_lse(answers: list[ScanAnswer]) -> Tensor:
    """Return the log-sum-exp [N] over all slices."""
    return torch.logsumexp(torch.stack([answer.lse for answer in answers if answer.lse is not None]), 0)


def sum_softplus(answers: list[ScanAnswer]) -> Tensor:
    """Return the sum [N] of log(1 + exp(z)) over all slices."""
    return sum_of([answer.softplus for answer in answers if answer.softplus is not None])


def sum_before(answers: list[ScanAnswer], num_rows: int) -> Tensor:
    """Return the number [N] of classes ranked before the label, over all slices."""
    counts = [answer.num_before for answer in answers if answer.num_before is not None]
    return torch.stack(counts).sum(0) if counts else torch.zeros(num_rows, dtype=torch.int64)
