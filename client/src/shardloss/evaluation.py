"""Results of exact evaluation: per row, summed over a data set, and compared with a sampled loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardloss.cost import CallCost
from shardloss.errors import InvalidArgument
from shardloss.wire import Array


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Sums over the counted rows, and the number of rows per rank; no value of a single row is kept.

    num_rows counts all rows, num_counted those that were not ignored. ranks [R] are ascending, with rank_counts [R] and
    R <= min(V, num_rows). ranks and rank_counts, or sigmoid_sum, are None if not requested. The means are nan if no row
    counts.
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
        """Mean negative log-likelihood in nats."""
        return mean(self.loss_sum, self.num_counted)

    @property
    def perplexity(self) -> float:
        """The perplexity exp(mean_loss), or inf on overflow."""
        try:
            return math.exp(self.mean_loss)
        except OverflowError:
            return math.inf

    @property
    def mean_sigmoid(self) -> float:
        """Mean sigmoid cross-entropy over all classes in nats.

        Raises:
            InvalidArgument: the sigmoid cross-entropy was not requested.
        """
        if self.sigmoid_sum is None:
            raise InvalidArgument("the sigmoid cross-entropy was not computed: evaluate with want_sigmoid=True")
        return mean(self.sigmoid_sum, self.num_counted)

    def hit_rate(self, k: int) -> float:
        """Return the share of counted rows whose true class is among the k best.

        Raises:
            InvalidArgument: k < 1, or ranks were not requested.
        """
        ranks, counts = self._ranks(k)
        return mean(float(counts[ranks <= k].sum()), self.num_counted)

    def mrr(self, k: int | None = None) -> float:
        """Return the mean reciprocal rank of the true class; a rank beyond k counts as 0.

        Raises:
            InvalidArgument: k < 1, or ranks were not requested.
        """
        ranks, counts = self._ranks(k)
        near = slice(None) if k is None else ranks <= k
        return mean(float((counts[near] / ranks[near]).sum()), self.num_counted)

    def _ranks(self, k: int | None) -> tuple[Array, Array]:
        if k is not None and k < 1:
            raise InvalidArgument(f"k = {k} must be at least 1", field="k")
        if self.ranks is None or self.rank_counts is None:
            raise InvalidArgument("ranks were not computed: evaluate with want_rank=True", field="want_rank")
        return self.ranks, self.rank_counts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact results per row; a field is None if it was not requested.

    loss [N] is in nats; rank [N] is that of the true class, 1 the best; sigmoid [N] is the sigmoid cross-entropy over
    all classes in nats. counted [N] is False for ignored rows, whose other values are 0; None means that all rows
    count. version and last_version are the table's versions when the first and the last slice ran. The means are over
    counted rows, and nan if there are none.
    """

    loss: Array
    rank: Array | None
    version: int
    last_version: int
    sigmoid: Array | None = None
    counted: Array | None = None
    cost: CallCost | None = None

    def summary(self) -> EvaluationSummary:
        """Return the summary of these rows."""
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
        """The number of rows that were not ignored."""
        return self.summary().num_counted

    @property
    def mean_loss(self) -> float:
        """Mean negative log-likelihood in nats."""
        return self.summary().mean_loss

    @property
    def perplexity(self) -> float:
        """The perplexity exp(mean_loss), or inf on overflow."""
        return self.summary().perplexity

    @property
    def mean_sigmoid(self) -> float:
        """Mean sigmoid cross-entropy over all classes in nats; see `EvaluationSummary.mean_sigmoid`."""
        return self.summary().mean_sigmoid

    def hit_rate(self, k: int) -> float:
        """Return the share of counted rows whose true class is among the k best; see `EvaluationSummary.hit_rate`."""
        return self.summary().hit_rate(k)

    def mrr(self, k: int | None = None) -> float:
        """Return the mean reciprocal rank, ranks beyond k counting as 0; see `EvaluationSummary.mrr`."""
        return self.summary().mrr(k)


@dataclass(frozen=True, slots=True)
class SamplingGap:
    """The sampled and the exact loss of the same rows, each [N] in nats; counted [N] is False for ignored rows.

    The sampled loss was computed at `version`, the exact one at exact_version to exact_last_version. If
    `is_one_version` is False, the table was trained in between, which accounts for part of the gap.
    """

    sampled: Array
    exact: Array
    counted: Array
    version: int
    exact_version: int
    exact_last_version: int

    @property
    def gap(self) -> Array:
        """The gap sampled - exact [N] in nats."""
        return np.asarray(self.sampled - self.exact)

    @property
    def mean_gap(self) -> float:
        """Mean of gap over counted rows in nats; nan if there are none."""
        return mean(float(self.gap[self.counted].sum(dtype=np.float64)), int(self.counted.sum()))

    @property
    def is_one_version(self) -> bool:
        """True if both losses are of the same version of the table."""
        return self.version == self.exact_version == self.exact_last_version


def mean(total: float, count: int) -> float:
    """Return total / count, or nan if count is 0."""
    return total / count if count else math.nan


def joined(first: EvaluationSummary, second: EvaluationSummary) -> EvaluationSummary:
    """Return one summary of the rows of two summaries, first before second.

    Raises:
        InvalidArgument: only one of them has ranks, or only one has a sigmoid sum.
    """
    if (first.ranks is None) != (second.ranks is None) or (first.sigmoid_sum is None) != (second.sigmoid_sum is None):
        raise InvalidArgument("only one of the two summaries has ranks or sigmoid sums: request the same for both")
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
