"""One pass over a live table: questions cut into slices between which training goes on, and answers merged again."""

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
SLICE_GATHERED = 1 << 22  # elements of asked rows of one slice: a gathered one costs as much as 64 multiply-adds
SLICE_LOGITS = 1 << 22  # asked logits, or draws, that all shards answer at once: 64 MiB
SLICE_DRAWS = 1 << 16  # draws of one slice: with one class they take some milliseconds
LOGIT_MACS = 64  # what a logit costs beside its product: exponential, key, comparisons; so does a cap, a softplus
DRAW_MACS = 128  # what the noise of one class in one draw costs: 7 ns, more where its memory is fresh
ROW_MACS = 64  # what an element of a row costs however few rows of hidden there are: fresh memory, float64, norm
UNIT_MACS = 64  # and what it costs more where it is normalized
SLICE_BEST = 1 << 17  # best classes that a slice sorts: 20 ms, however small it is
SLICE_ROWS = 512  # rows of hidden a slice takes


def macs_a_class(question: Question, dim: int) -> int:
    """What one class costs in a scan, in multiply-adds."""
    transform = question.transform
    passes = 1 + (transform.soft_cap is not None) + question.with_softplus
    num_draws = 0 if question.draws is None else question.draws.numel()
    row_macs = ROW_MACS + UNIT_MACS * transform.normalize
    return len(question.hidden) * (dim + passes * LOGIT_MACS) + num_draws * DRAW_MACS + dim * row_macs


def asked_rows(num_asked: int, spec: TableSpec) -> int:
    """Rows of hidden whose asked classes are one slice of work, and of answers from all shards."""
    num_asked = max(1, num_asked)
    by_work = SLICE_GATHERED // (num_asked * spec.dim)
    by_answer = SLICE_LOGITS // (num_asked * spec.placement.num_shards)
    return max(1, min(SLICE_ROWS, by_work, by_answer))


def asked_classes(num_rows: int, spec: TableSpec) -> int:
    """Asked classes of so many rows of hidden whose logits are one slice of work."""
    return max(1, SLICE_GATHERED // (max(1, num_rows) * spec.dim))


def ranked_rows(k: int) -> int:
    """Rows of hidden whose k best classes one slice finds."""
    return max(1, min(SLICE_ROWS, SLICE_BEST // k))


def drawn_block(num_samples: int, spec: TableSpec) -> tuple[int, int]:
    """Rows of hidden, and draws of each, that one slice takes."""
    most = max(1, min(SLICE_DRAWS, SLICE_LOGITS // spec.placement.num_shards))
    return max(1, min(SLICE_ROWS, most // num_samples)), min(num_samples, most)


class Scan:
    """One pass over a table: asks every slice in turn and remembers which versions it saw."""

    def __init__(self, catalog: Catalog, owner: TableOwner, transform: Transform, deadline: Deadline) -> None:
        self._group, self._owner, self._deadline = catalog.group, owner, deadline
        self._dtype: torch.dtype = getattr(torch, owner.spec.compute_dtype)
        self._seen: list[int] = []
        self.transform, self.deadline = transform, deadline

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
        """Logits and keys of class_ids [N, S]; 0 for padding."""
        size = asked_classes(len(hidden), self._owner.spec)
        pieces = [self._asked(hidden, ids.contiguous()) for ids in torch.split(class_ids, size, dim=1)]
        logits, keys = ([getattr(piece, name) for piece in pieces] for name in ("logits", "keys"))
        return AskedLogits(torch.cat(logits, 1), torch.cat(keys, 1), pieces[-1].version)

    def _asked(self, hidden: Tensor, class_ids: Tensor) -> AskedLogits:
        """Those of one slice."""
        start = lambda: self._group.asked_logits(self._owner.key, hidden, class_ids, self.transform)  # noqa: E731
        answers = self._owner.ask(start, self._deadline)
        meter().flops += products(class_ids.numel(), self._owner.spec)
        version = self._owner.same_version([a.version for a in answers])
        self._seen.append(version)
        return AskedLogits(sum_of([a.logits for a in answers]), sum_of([a.keys for a in answers]), version)

    def versions(self) -> tuple[int, int]:
        """The first and last version seen."""
        seen = self._seen or [self._owner.steps.version]
        return seen[0], seen[-1]


def cat(pieces: list[Tensor]) -> Tensor:
    """Concatenate pieces [n_i]; [0] for none."""
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def sum_of(pieces: list[Tensor]) -> Tensor:
    """Sum of at least one tensor of one shape."""
    return torch.stack(pieces).sum(0)


def folded(answers: Iterable[ScanAnswer]) -> list[ScanAnswer]:
    """One answer for all in place of them, folded as they come: a big table has tens of thousands."""
    return [reduce(of_both, answers)]


def of_both(a: ScanAnswer, b: ScanAnswer) -> ScanAnswer:
    """The answer over the classes of both; best and drawn are folded by `best_of` and `drawn_of`."""
    return ScanAnswer(
        b.version,
        None if a.lse is None or b.lse is None else torch.logaddexp(a.lse, b.lse),
        None if a.num_before is None or b.num_before is None else a.num_before + b.num_before,
        None,
        None if a.softplus is None or b.softplus is None else a.softplus + b.softplus,
    )


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


def drawn_of(answers: Iterable[ScanAnswer]) -> tuple[Drawn, Tensor]:
    """The winners over all slices, and their lse [N] (0 where it was not asked for), folded as they come."""
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
    """Of each draw the one of two whose score is higher; nan, which is refused later, wins."""
    wins = (b.scores > a.scores) | b.scores.isnan()
    return Drawn(
        torch.where(wins, b.class_ids, a.class_ids),
        torch.where(wins, b.scores, a.scores),
        torch.where(wins, b.logits, a.logits),
    )


def merged_lse(answers: list[ScanAnswer]) -> Tensor:
    """Log-sum-exp over slices [N]."""
    return torch.logsumexp(torch.stack([answer.lse for answer in answers if answer.lse is not None]), 0)


def sum_softplus(answers: list[ScanAnswer]) -> Tensor:
    """Sum of log(1 + exp(z)) over slices [N]."""
    return sum_of([answer.softplus for answer in answers if answer.softplus is not None])


def sum_before(answers: list[ScanAnswer], num_rows: int) -> Tensor:
    """Number of classes before the label over slices [N]."""
    counts = [answer.num_before for answer in answers if answer.num_before is not None]
    return torch.stack(counts).sum(0) if counts else torch.zeros(num_rows, dtype=torch.int64)
