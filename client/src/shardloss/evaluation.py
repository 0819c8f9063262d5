"""What exact questions found, in numbers: per row, over a data set, and beside a sampled loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardloss.cost import CallCost
from shardloss.errors import InvalidArgument
from shardloss.wire import Array


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Sums over counted rows, and how often each rank came: at most min(V, rows) numbers, none of them a row's own.

    num_rows counts all rows, num_counted those that were not ignored. ranks [R] ascending, rank_counts [R]; None where
    ranks, or sigmoid_sum, were not asked for. The means are nan where no row counts.
    """

    num_rows: int
    num_counted: int
    loss_sum: float
    sigmoid_sum: float | None
    ranks: Array | None
    rank_counts: Array | None
    version: int
    last_version: int

    @property
    def mean_loss(self) -> float:
        """Mean negative log likelihood, nats."""
        return mean(self.loss_sum, self.num_counted)

    @property
    def perplexity(self) -> float:
        """exp(mean_loss); inf where that overflows."""
        try:
            return math.exp(self.mean_loss)
        except OverflowError:
            return math.inf

    @property
    def mean_sigmoid(self) -> float:
        """Mean sigmoid cross-entropy over all classes, nats.

        Raises:
            InvalidArgument: it was not asked for.
        """
        if self.sigmoid_sum is None:
            raise InvalidArgument("no sigmoid cross-entropy is here: evaluate with want_sigmoid=True")
        return mean(self.sigmoid_sum, self.num_counted)

    def hit_rate(self, k: int) -> float:
        """Share of the rows whose true class is among the k best.

        Raises:
            InvalidArgument: k < 1, or ranks were not asked for.
        """
        ranks, counts = self._ranks(k)
        return mean(float(counts[ranks <= k].sum()), self.num_counted)

    def mrr(self, k: int | None = None) -> float:
        """Mean reciprocal rank of the true class; ranks beyond k count 0.

        Raises:
            InvalidArgument: k < 1, or ranks were not asked for.
        """
        ranks, counts = self._ranks(k)
        near = slice(None) if k is None else ranks <= k
        return mean(float((counts[near] / ranks[near]).sum()), self.num_counted)

    def _ranks(self, k: int | None) -> tuple[Array, Array]:
        if k is not None and k < 1:
            raise InvalidArgument(f"k = {k} must be at least 1", field="k")
        if self.ranks is None or self.rank_counts is None:
            raise InvalidArgument("no ranks are here: evaluate with want_rank=True", field="want_rank")
        return self.ranks, self.rank_counts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact answers per row; None where not asked for.

    loss [N] nats; rank [N] of the true class, 1 the best; sigmoid [N], sigmoid cross-entropy over all classes, nats.
    counted [N] is False in ignored rows, where all else is 0; None: all count. version and last_version are the table's
    when the first slice ran, and the last; cost is None unless asked for. The means are over counted rows, nan where
    there is none.
    """

    loss: Array
    rank: Array | None
    version: int
    last_version: int
    sigmoid: Array | None = None
    counted: Array | None = None
    cost: CallCost | None = None

    def summary(self) -> EvaluationSummary:
        """The sums of these rows."""
        counted = np.ones(len(self.loss), dtype=bool) if self.counted is None else self.counted
        ranks, counts = (None, None) if self.rank is None else np.unique(self.rank[counted], return_counts=True)
        return EvaluationSummary(
            num_rows=len(self.loss),
            num_counted=int(counted.sum()),
            loss_sum=float(self.loss[counted].sum(dtype=np.float64)),
            sigmoid_sum=None if self.sigmoid is None else float(self.sigmoid[counted].sum(dtype=np.float64)),
            ranks=ranks,
            rank_counts=counts,
            version=self.version,
            last_version=self.last_version,
        )

    @property
    def num_counted(self) -> int:
        """Rows that were not ignored."""
        return self.summary().num_counted

    @property
    def mean_loss(self) -> float:
        """Mean negative log likelihood, nats."""
        return self.summary().mean_loss

    @property
    def perplexity(self) -> float:
        """exp(mean_loss); inf where that overflows."""
        return self.summary().perplexity

    @property
    def mean_sigmoid(self) -> float:
        """Mean sigmoid cross-entropy over all classes, nats; raises as `EvaluationSummary.mean_sigmoid`."""
        return self.summary().mean_sigmoid

    def hit_rate(self, k: int) -> float:
        """Share of the rows whose true class is among the k best; raises as `EvaluationSummary.hit_rate`."""
        return self.summary().hit_rate(k)

    def mrr(self, k: int | None = None) -> float:
        """Mean reciprocal rank, ranks beyond k counting 0; raises as `EvaluationSummary.mrr`."""
        return self.summary().mrr(k)


@dataclass(frozen=True, slots=True)
class SamplingGap:
    """The sampled and the exact loss of the same rows, each [N], nats; counted [N] is False in ignored rows.

    Sampled at `version`, exact from exact_version to exact_last_version: where `is_one_version` is False, others
    trained between, and a part of the gap is their work.
    """

    sampled: Array
    exact: Array
    counted: Array
    version: int
    exact_version: int
    exact_last_version: int

    @property
    def gap(self) -> Array:
        """sampled - exact [N], nats."""
        return np.asarray(self.sampled - self.exact)

    @property
    def mean_gap(self) -> float:
        """Mean of gap over counted rows, nats; nan where there is none."""
        return mean(float(self.gap[self.counted].sum(dtype=np.float64)), int(self.counted.sum()))

    @property
    def is_one_version(self) -> bool:
        """Whether both losses are of the same version of the table."""
        return self.version == self.exact_version == self.exact_last_version


def mean(total: float, count: int) -> float:
    """total / count; nan for none."""
    return total / count if count else math.nan


def joined(first: EvaluationSummary, second: EvaluationSummary) -> EvaluationSummary:
    """The summary of the rows of both, first before second.

    Raises:
        InvalidArgument: one has ranks, or sigmoid sums, and the other has not.
    """
    if (first.ranks is None) != (second.ranks is None) or (first.sigmoid_sum is None) != (second.sigmoid_sum is None):
        raise InvalidArgument("the summaries answer different questions")
    ranks, counts = first.ranks, first.rank_counts
    if ranks is not None and counts is not None and second.ranks is not None and second.rank_counts is not None:
        ranks, place = np.unique(np.concatenate([ranks, second.ranks]), return_inverse=True)
        both = np.concatenate([counts, second.rank_counts])
        counts = np.zeros(len(ranks), dtype=np.int64)
        np.add.at(counts, place, both)
    sigmoid_sum = first.sigmoid_sum
    if sigmoid_sum is not None and second.sigmoid_sum is not None:
        sigmoid_sum += second.sigmoid_sum
    return EvaluationSummary(
        num_rows=first.num_rows + second.num_rows,
        num_counted=first.num_counted + second.num_counted,
        loss_sum=first.loss_sum + second.loss_sum,
        sigmoid_sum=sigmoid_sum,
        ranks=ranks,
        rank_counts=counts,
        version=first.version,
        last_version=second.last_version,
    )
