"""Exact evaluation of a live table over all classes, in float64, without changing it. NumPy in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.message import Message

from shardloss import evaluation, messages, types, wire
from shardloss.cost import sum_of
from shardloss.errors import BadReply
from shardloss.messages import numbers
from shardloss.paging import asked, check_length, count_of, from_row, joined, of_rank, pages
from shardloss.v1 import evaluation_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.client import LossClient

PAGE_NOISE = 1 << 31  # random numbers per page of draws: 15 s on one core

T = TypeVar("T")


class Questions:
    """The exact evaluation methods of a `Table`.

    Each call is sent in pages, and each page has the client's full timeout_s. `logits` is the transform that the model
    was trained with; None is hidden . row + bias. `want_cost` requests the total cost of all pages.
    """

    client: LossClient
    spec: types.TableInfo
    reference: str

    def evaluate(
        self,
        hidden: Array,
        labels: Array,
        *,
        want_rank: bool = True,
        want_sigmoid: bool = False,
        ignore_index: int | None = -100,
        logits: types.LogitTransform | None = None,
        want_cost: bool = False,
    ) -> types.Evaluation:
        """Return the exact negative log-likelihood [N] in nats and the rank [N] of labels [N] under hidden [N, D].

        Both are over all classes. want_sigmoid requests the sigmoid cross-entropy against the one-hot label, summed
        over all classes, as TensorFlow evaluates models trained with nce_loss. Rows with ignore_index do not count;
        their loss and rank are 0.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `compute_loss`; index counts over all pages.
        """
        hidden, labels = of_rank(hidden, 2, "hidden"), of_rank(labels, 1, "labels")
        check_length(labels, hidden, "labels")
        ignore_index = None if ignore_index is None else wire.integer(ignore_index, "ignore_index")
        transform = messages.logit_transform(logits)

        def ask(page: slice) -> types.Evaluation:
            with messages.writing_request():
                request = evaluation_pb2.EvaluateRequest(
                    table=self.reference,
                    hidden=numbers(hidden[page], "hidden"),
                    labels=numbers(labels[page], "labels"),
                    want_rank=want_rank,
                    want_sigmoid=want_sigmoid,
                    ignore_index=ignore_index,
                    logits=transform,
                    want_cost=want_cost,
                )
            return messages.evaluation(self._ask(self.client.questions.Evaluate, request))

        found = [asked(ask, page) for page in self._pages(len(hidden))]
        return types.Evaluation(
            loss=np.concatenate([page.loss for page in found]),
            rank=joined([page.rank for page in found]) if want_rank else None,
            version=found[0].version,
            last_version=found[-1].last_version,
            sigmoid=joined([page.sigmoid for page in found]) if want_sigmoid else None,
            counted=np.ones(len(labels), dtype=bool) if ignore_index is None else np.asarray(labels != ignore_index),
            cost=sum_of([page.cost for page in found]),
        )

    def evaluate_batches(
        self,
        batches: Iterable[tuple[Array, Array]],
        *,
        progress: Callable[[int], None] | None = None,
        want_rank: bool = True,
        want_sigmoid: bool = False,
        ignore_index: int | None = -100,
        logits: types.LogitTransform | None = None,
    ) -> types.EvaluationSummary:
        """Evaluate a data set in batches of hidden [N, D] and labels [N], with `evaluate`, and return its summary.

        Each batch is read after the previous one is answered. Only sums and the number of rows per rank are kept, no
        batch or row. progress(rows so far) is called after each batch.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`; index counts over all batches.
        """

        def ask(hidden: Array, labels: Array) -> types.EvaluationSummary:
            found = self.evaluate(
                hidden,
                labels,
                want_rank=want_rank,
                want_sigmoid=want_sigmoid,
                ignore_index=ignore_index,
                logits=logits,
            )
            return found.summary()

        total: types.EvaluationSummary | None = None
        for hidden, labels in batches:
            found = from_row(0 if total is None else total.num_rows, lambda: ask(hidden, labels))  # noqa: B023 (at once)
            total = found if total is None else evaluation.joined(total, found)
            if progress is not None:
                progress(total.num_rows)
        return ask(np.zeros((0, self.spec.dim)), np.zeros(0, np.int64)) if total is None else total

    def top_k(
        self,
        hidden: Array,
        k: int,
        *,
        want_log_probs: bool = True,
        logits: types.LogitTransform | None = None,
        want_cost: bool = False,
    ) -> types.TopK:
        """Return the k best classes of each row of hidden [N, D], by descending logit and then by lower id.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`.
        """
        hidden, transform = of_rank(hidden, 2, "hidden"), messages.logit_transform(logits)

        def ask(page: slice) -> types.TopK:
            with messages.writing_request():
                request = evaluation_pb2.TopKRequest(
                    table=self.reference,
                    hidden=numbers(hidden[page], "hidden"),
                    k=k,
                    want_log_probs=want_log_probs,
                    logits=transform,
                    want_cost=want_cost,
                )
            return messages.top_k(self._ask(self.client.questions.TopK, request))

        found = [asked(ask, page) for page in self._pages(len(hidden), 3 * count_of(k, "k"))]
        return types.TopK(
            np.concatenate([page.class_ids for page in found]),
            np.concatenate([page.logits for page in found]),
            joined([page.log_probs for page in found]),
            found[0].version,
            found[-1].last_version,
            sum_of([page.cost for page in found]),
        )

    def score(
        self,
        hidden: Array,
        class_ids: Array,
        *,
        want_log_probs: bool = False,
        logits: types.LogitTransform | None = None,
        want_cost: bool = False,
    ) -> types.Scores:
        """Return the logits [N, S] of class_ids [S] (shared) or [N, S] under hidden [N, D].

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`.
        """
        hidden, class_ids = of_rank(hidden, 2, "hidden"), np.asarray(class_ids)
        if class_ids.ndim != 1:
            check_length(of_rank(class_ids, 2, "class_ids"), hidden, "class_ids")
        transform = messages.logit_transform(logits)

        def ask(page: slice) -> types.Scores:
            asked_ids = class_ids[page] if class_ids.ndim == 2 else class_ids
            with messages.writing_request():
                request = evaluation_pb2.ScoreRequest(
                    table=self.reference,
                    hidden=numbers(hidden[page], "hidden"),
                    class_ids=numbers(asked_ids, "class_ids"),
                    want_log_probs=want_log_probs,
                    logits=transform,
                    want_cost=want_cost,
                )
            return messages.scores(self._ask(self.client.questions.Score, request))

        found = [asked(ask, page) for page in self._pages(len(hidden), 3 * class_ids.shape[-1])]
        all_logits = np.concatenate([page.logits for page in found])
        log_probs = joined([page.log_probs for page in found])
        costs = sum_of([page.cost for page in found])
        return types.Scores(all_logits, log_probs, found[0].version, found[-1].last_version, costs)

    def probabilities(self, hidden: Array, class_ids: Array, *, logits: types.LogitTransform | None = None) -> Array:
        """Return the probabilities [N, S], over all classes, of class_ids [S] (shared) or [N, S].

        They equal exp(log_probs) of `score`.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`.
        """
        log_probs = self.score(hidden, class_ids, want_log_probs=True, logits=logits).log_probs
        if log_probs is None:
            raise BadReply("the reply contains no log_probs")
        return np.asarray(np.exp(log_probs))

    def sample_classes(
        self,
        hidden: Array,
        num_samples: int,
        *,
        seed: int = 0,
        first_row: int = 0,
        top_k: int | None = None,
        want_log_probs: bool = False,
        logits: types.LogitTransform | None = None,
        want_cost: bool = False,
    ) -> types.ClassSamples:
        """Draw num_samples S independent classes for each row of hidden [N, D] from its exact softmax.

        A draw is a function of the table, the row, and (seed, number of the row, number of the draw). Rows are numbered
        from first_row, so that a data set split into batches gives the same draws. top_k draws only from the k best
        classes, and log_probs are then those of the softmax over these. The temperature is 1 / logits.scale. A call
        generates N S V random numbers, or N S k with top_k, at about 10^8 per second per core.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `evaluate`.
        """
        hidden, transform = of_rank(hidden, 2, "hidden"), messages.logit_transform(logits)

        def ask(page: slice) -> types.ClassSamples:
            with messages.writing_request():
                request = evaluation_pb2.SampleClassesRequest(
                    table=self.reference,
                    hidden=numbers(hidden[page], "hidden"),
                    num_samples=num_samples,
                    seed=seed,
                    first_row=first_row + page.start,
                    top_k=top_k,
                    want_log_probs=want_log_probs,
                    logits=transform,
                    want_cost=want_cost,
                )
            return messages.class_samples(self._ask(self.client.questions.SampleClasses, request))

        samples_a_row = count_of(num_samples, "num_samples")
        noise_a_row = samples_a_row * (self.spec.num_classes if top_k is None else count_of(top_k, "top_k"))
        cut = pages(len(hidden), self.spec.dim + 1 + 2 * samples_a_row, max(1, PAGE_NOISE // noise_a_row))
        found = [asked(ask, page) for page in cut]
        return types.ClassSamples(
            np.concatenate([page.class_ids for page in found]),
            joined([page.log_probs for page in found]),
            found[0].version,
            found[-1].last_version,
            sum_of([page.cost for page in found]),
        )

    def _ask(self, method: Callable[..., T], request: Message) -> T:
        return self.client.channel.unary(method, request, None, whole=True)

    def _pages(self, num_rows: int, width: int = 0) -> Iterator[slice]:
        """Yield pages of rows of hidden, allowing for width numbers per row in the reply."""
        return pages(num_rows, self.spec.dim + 1 + width)
