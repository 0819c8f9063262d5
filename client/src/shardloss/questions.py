"""Exact questions to a live table: over all classes, in float64, changing nothing. NumPy in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.message import Message

from shardloss import evaluation, messages, types
from shardloss.cost import sum_of
from shardloss.errors import BadReply
from shardloss.messages import numbers
from shardloss.paging import asked, check_length, count_of, from_row, joined, of_rank, pages
from shardloss.v1 import evaluation_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.client import LossClient

PAGE_NOISE = 1 << 31  # numbers of noise that a page of draws takes: 15 s on one core

T = TypeVar("T")


class Questions:
    """The exact questions of a `Table`.

    Each goes in pages, and each page has the whole of the client's timeout_s. `logits` says how logits are made of
    hidden and rows, as the model was trained; None is hidden . row + bias. `want_cost` asks what all pages cost.
    """

    client: LossClient
    spec: types.TableInfo
    name: str

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
        """Exact negative log likelihood [N] in nats, and rank, over all classes of hidden [N, D] with labels [N].

        want_sigmoid asks for the sigmoid cross-entropy against the one-hot label, summed over all classes, as
        TensorFlow evaluates what it trained by nce_loss. Rows with ignore_index do not count: loss 0, rank 0.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `compute_loss`; index counts over all pages.
        """
        hidden, labels = of_rank(hidden, 2, "hidden"), of_rank(labels, 1, "labels")
        check_length(labels, hidden, "labels")
        transform = messages.logit_transform(logits)

        def ask(page: slice) -> types.Evaluation:
            with messages.writing_request():
                request = evaluation_pb2.EvaluateRequest(
                    table=self.name,
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
        """`evaluate` over a data set: batches of hidden [N, D] and labels [N], each taken when the last is answered.

        Keeps sums and how often each rank came, no batch and no row. progress(rows so far) is called after each batch.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `evaluate`; index counts over all batches.
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
        """The k best classes of hidden [N, D]: logit descending, ties by lower id; in pages.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `evaluate`.
        """
        hidden, transform = of_rank(hidden, 2, "hidden"), messages.logit_transform(logits)

        def ask(page: slice) -> types.TopK:
            with messages.writing_request():
                request = evaluation_pb2.TopKRequest(
                    table=self.name,
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
        """Logits of class_ids [S] (shared) or [N, S] under hidden [N, D]; in pages.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `evaluate`.
        """
        hidden, class_ids = of_rank(hidden, 2, "hidden"), np.asarray(class_ids)
        if class_ids.ndim != 1:
            check_length(of_rank(class_ids, 2, "class_ids"), hidden, "class_ids")
        transform = messages.logit_transform(logits)

        def ask(page: slice) -> types.Scores:
            asked_ids = class_ids[page] if class_ids.ndim == 2 else class_ids
            with messages.writing_request():
                request = evaluation_pb2.ScoreRequest(
                    table=self.name,
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
        """Probabilities [N, S] among all classes of class_ids [S] (shared) or [N, S]: exp of `score`'s log_probs.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `evaluate`.
        """
        log_probs = self.score(hidden, class_ids, want_log_probs=True, logits=logits).log_probs
        if log_probs is None:
            raise BadReply("the reply holds no log_probs")
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
        """num_samples S independent classes of each row of hidden [N, D], by its exact softmax; in pages.

        A draw is a function of the table, the row, and (seed, number of the row, number of the draw): rows count from
        first_row, so that a data set cut in batches draws the same. top_k draws among the k best classes alone, and
        log_probs are then of the softmax over these. The temperature is 1 / logits.scale. N S V numbers of noise are
        made, N S k among the best, about 10^8 a second and core.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `evaluate`.
        """
        hidden, transform = of_rank(hidden, 2, "hidden"), messages.logit_transform(logits)

        def ask(page: slice) -> types.ClassSamples:
            with messages.writing_request():
                request = evaluation_pb2.SampleClassesRequest(
                    table=self.name,
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
        """Pages of rows of hidden with width numbers of the reply beside each."""
        return pages(num_rows, self.spec.dim + 1 + width)
