"""One table of a server: heads that train it, exact questions, rows. NumPy in and out; torch only in heads."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from shardloss import chunks, messages, types
from shardloss.channel import single
from shardloss.errors import BadReply, InvalidArgument, LimitExceeded
from shardloss.lazy_rows import LazyRows, lazy_rows
from shardloss.messages import Numbers, numbers
from shardloss.paging import asked, joined, of_rank, pages
from shardloss.questions import Questions
from shardloss.session import Session
from shardloss.v1 import loss_pb2, table_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from torch import Tensor

    from shardloss.autograd import (
        MarginSoftmaxHead,
        SampledLogisticHead,
        SampledSoftmaxHead,
        SigmoidHead,
        SoftmaxHead,
    )
    from shardloss.client import LossClient
    from shardloss.lazy import LazyLogits

GAP_TRIES = 3
REPLY_BYTES = 8  # an element of a reply takes this much at most
LARGEST = {  # finite numbers of the storage dtypes
    "float32": float(np.finfo(np.float32).max),
    "float64": float(np.finfo(np.float64).max),
    "bfloat16": 255 * 2.0**120,
}


class Table(Questions):
    """One table of a server: heads that train it, exact questions, rows."""

    def __init__(self, client: LossClient, info: types.TableInfo) -> None:
        self.client, self.spec = client, info
        self.name = info.name

    def info(self) -> types.TableInfo:
        """The table as it stands now."""
        return self.client.table(self.name).spec

    def softmax(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: Array | None = None,
        z_loss: float = 0.0,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SoftmaxHead:
        """A torch.nn.Module of the exact softmax loss over all classes; see `shardloss.autograd.Head`.

        label_smoothing and class_weights [V] as in torch.nn.functional.cross_entropy; z_loss adds z_loss * lse ** 2 a
        row; logits says how logits are made (temperature, soft cap, cosines). reduction is "mean", "sum" or "none";
        rows whose labels are all ignore_index do not count, None counts all. With a learning_rate the head commits in
        backward; without one, by `head.optimizer(lr)`.

        Raises:
            InvalidArgument: an unknown reduction, or class_weights of another length.
        """
        from shardloss.autograd import SoftmaxHead

        loss = types.FullSoftmax(label_smoothing, class_weights, None, z_loss, logits or types.LogitTransform())
        return SoftmaxHead(self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)

    def sampled_softmax(
        self,
        num_sampled: int = 0,
        *,
        sampler: types.Sampler = "log_uniform",
        unique: bool = True,
        seed: int | None = None,
        remove_accidental_hits: bool = True,
        hit_removal: str = "every",
        num_hard_negatives: int = 0,
        z_loss: float = 0.0,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SampledSoftmaxHead:
        """A torch.nn.Module of the sampled softmax loss; see `shardloss.autograd.Head`.

        Each step draws num_sampled candidates by sampler (see `shardloss.SampledSoftmax`; "log_uniform" is for ids
        sorted by falling frequency), distinct where unique, from (seed, step); seed None comes from torch's generator.
        remove_accidental_hits takes candidates that are labels of a row out of it: "every" copy, or "last" alone as
        TensorFlow. num_hard_negatives > 0 keeps so many of the best candidates of each row alone. num_sampled 0 is for
        a head that is always given sampled_values, and for samplers that need none. The rest is as in `softmax`.

        Raises:
            InvalidArgument: an unknown sampler, hit_removal or reduction.
        """
        from shardloss.autograd import SampledSoftmaxHead, fresh_seed

        loss = types.SampledSoftmax(
            num_sampled=num_sampled,
            sampler=sampler,
            unique=unique,
            seed=fresh_seed() if seed is None else seed,
            remove_accidental_hits=remove_accidental_hits,
            hit_removal=hit_removal,
            num_hard_negatives=num_hard_negatives,
            z_loss=z_loss,
            logits=logits or types.LogitTransform(),
        )
        messages.check_loss(loss)
        return SampledSoftmaxHead(
            self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def nce(
        self,
        num_sampled: int = 0,
        *,
        sampler: types.Sampler = "log_uniform",
        unique: bool = True,
        seed: int | None = None,
        remove_accidental_hits: bool = False,
        hit_removal: str = "every",
        subtract_log_q: bool = True,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SampledLogisticHead:
        """A torch.nn.Module of noise-contrastive estimation, TensorFlow's nce_loss; see `shardloss.autograd.Head`.

        With remove_accidental_hits it is the sampled logistic loss; subtract_log_q False is negative sampling. The rest
        is as in `sampled_softmax`.

        Raises:
            InvalidArgument: an unknown sampler, hit_removal or reduction.
        """
        from shardloss.autograd import SampledLogisticHead, fresh_seed

        loss = types.SampledLogistic(
            num_sampled=num_sampled,
            sampler=sampler,
            unique=unique,
            seed=fresh_seed() if seed is None else seed,
            remove_accidental_hits=remove_accidental_hits,
            hit_removal=hit_removal,
            subtract_log_q=subtract_log_q,
            logits=logits or types.LogitTransform(),
        )
        messages.check_loss(loss)
        return SampledLogisticHead(
            self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def sigmoid(
        self,
        *,
        logits: types.LogitTransform | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SigmoidHead:
        """A torch.nn.Module of the logistic loss over all classes, summed a row; see `shardloss.autograd.Head`.

        As torch.nn.functional.binary_cross_entropy_with_logits(h @ W.T + b, multi-hot labels, "none").sum(-1). The rest
        is as in `softmax`.

        Raises:
            InvalidArgument: an unknown reduction.
        """
        from shardloss.autograd import SigmoidHead

        loss = types.FullSigmoid(logits or types.LogitTransform())
        return SigmoidHead(self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)

    def margin_softmax(
        self,
        *,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        scale: float = 64.0,
        normalize: bool = True,
        num_sampled: int = 0,
        seed: int | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> MarginSoftmaxHead:
        """A torch.nn.Module of the combined margin softmax: ArcFace (m2), CosFace (m3), SphereFace (m1).

        Hidden and rows are divided by their norms unless normalize is False, where hidden . row is taken for a cosine.
        num_sampled > 0 trains as PartialFC: on the batch's classes and uniform negatives, num_sampled in all, by
        (seed, step). The table has no biases. The rest is as in `softmax`.

        Raises:
            InvalidArgument: an unknown reduction.
        """
        from shardloss.autograd import MarginSoftmaxHead, fresh_seed

        margin, logits = types.Margin(m1, m2, m3), types.LogitTransform(scale, None, normalize)
        loss: types.FullSoftmax | types.SampledSoftmax = types.FullSoftmax(margin=margin, logits=logits)
        if num_sampled:
            seed = fresh_seed() if seed is None else seed
            loss = types.SampledSoftmax(
                num_sampled=num_sampled, sampler=types.PartialFc(), seed=seed, margin=margin, logits=logits
            )
        return MarginSoftmaxHead(
            self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def logits(self, hidden: Tensor, transform: types.LogitTransform | None = None) -> LazyLogits:
        """The logits [..., V] of hidden [..., D], of which nothing is held: what `shardloss.compat.paddle` takes.

        transform says how they are made (scale, soft cap, cosines).

        Raises:
            InvalidArgument: hidden is not a float tensor [..., D].
        """
        from shardloss.lazy import LazyLogits

        return LazyLogits(self, hidden, transform)

    def session(self) -> Session:
        """A new session: the steps of one trainer.

        Raises:
            TableNotFound: the table was deleted.
        """
        return Session(self, secrets.token_hex(16), self.info().version)

    def compute_loss(
        self,
        hidden: Numbers,
        labels: Array | None,
        loss: types.Loss,
        *,
        step: int = 0,
        label_distribution: Array | None = None,
        label_weights: Numbers | None = None,
        ignore_index: int | None = None,
        upstream: Array | None = None,
        want_lse: bool = False,
        want_hidden_grad: bool = False,
        want_table_grad: bool = False,
        want_scale_grad: bool = False,
    ) -> types.LossResult:
        """Score hidden [N, D] with labels [N] or [N, T]; opens no ticket and changes nothing.

        label_weights [N, T] belong to losses over all classes, None is 1/T (1 in a full sigmoid); labels equal to
        ignore_index do not count. In their place (labels None) a label_distribution [N, V] may stand, a weight >= 0 for
        every class: it streams to a FullSoftmax in columns, those of zeros left out. step keys the sampler.
        want_table_grad asks for the gradient of sum(upstream [N] * loss) in the rows, for callers who own the
        optimizer; want_scale_grad for that of each loss in the logits' scale. Losses are in nats.

        Raises:
            InvalidArgument: naming the field and the first offending index.
            LimitExceeded: larger than the server takes; split the batch.
            TransientError: nobody answered in time, or the server is full; repeat.
            RowsLost: a worker died with rows of this table.
        """
        request = messages.loss_request(
            self.name,
            hidden,
            labels,
            loss,
            label_weights=label_weights,
            ignore_index=ignore_index,
            upstream=upstream,
            want_lse=want_lse,
            want_hidden_grad=want_hidden_grad,
            want_table_grad=want_table_grad,
            want_scale_grad=want_scale_grad,
        )
        request.step = step
        return self.send_loss(request, label_distribution)

    def send_loss(
        self, request: loss_pb2.ComputeLossRequest, label_distribution: Array | None = None
    ) -> types.LossResult:
        """Send a request as one message, or in chunks where it or its reply is too large for one.

        Raises:
            ShardlossError: as `compute_loss`.
        """
        channel, limits = self.client.channel, self.client.info.limits
        limit, chunk = int(limits["max_message_bytes"]), int(limits["max_chunk_bytes"])
        columns = None
        if label_distribution is not None or request.label_columns:
            columns = self._checked_distribution(request, label_distribution)
        elif max(request.ByteSize(), self._reply_bytes(request)) <= limit:
            return messages.loss_result(channel.unary(self.client.losses.ComputeLoss, request, None))

        def pieces() -> Iterator[loss_pb2.StreamLossRequest]:
            header, parts = chunks.detach(request, chunk)
            yield loss_pb2.StreamLossRequest(header=header)
            for part in parts:
                yield loss_pb2.StreamLossRequest(chunk=part)
            if columns is not None:
                for piece in messages.label_columns(columns, chunk):
                    yield loss_pb2.StreamLossRequest(columns=piece)

        replies = channel.stream(self.client.losses.StreamLoss, pieces, None)
        with messages.reading_reply():
            header = single(replies, "header")
            assembler = chunks.Assembler(header, 2 * int(limits["max_reply_bytes"]), chunk)
            for piece in replies[1:]:
                assembler.add(piece.chunk)
            return messages.loss_result(header, assembler.contents())

    def _checked_distribution(self, request: loss_pb2.ComputeLossRequest, distribution: Array | None) -> Array:
        """A label distribution [N, V] whose every column fits a piece.

        Raises:
            InvalidArgument, LimitExceeded: it is absent, stands beside labels, has another shape or too many rows.
        """
        if distribution is None or not request.label_columns:
            raise InvalidArgument("give labels or a label_distribution, and not both", field="labels")
        distribution, shape = np.asarray(distribution), [*request.hidden.shape[:1], self.spec.num_classes]
        if list(distribution.shape) != shape or distribution.dtype.kind != "f":
            raise InvalidArgument(
                f"label_distribution is {distribution.dtype} {list(distribution.shape)}; floats {shape} are needed",
                field="label_distribution",
            )
        most = int(self.client.info.limits["max_chunk_bytes"])
        if len(distribution) * distribution.itemsize > most:
            raise LimitExceeded(f"a column of {len(distribution)} labels exceeds {most} bytes; split the batch")
        return distribution

    def _reply_bytes(self, request: loss_pb2.ComputeLossRequest) -> int:
        num_rows, dim = next(iter(request.hidden.shape), 0), self.spec.dim
        elements = 3 * num_rows + (num_rows * dim if request.want_hidden_grad else 0)
        if request.want_table_grad:
            elements += self._num_touched(request) * (dim + 2)
        return elements * REPLY_BYTES + 4096

    def _num_touched(self, request: loss_pb2.ComputeLossRequest) -> int:
        """At most so many rows have a gradient."""
        kind = request.WhichOneof("loss")
        if kind not in ("sampled_softmax", "sampled_logistic"):
            return self.spec.num_classes
        columns = request.sampled_softmax if kind == "sampled_softmax" else request.sampled_logistic.columns
        num_labels = int(np.prod(request.labels.shape))
        num_drawn = max(columns.sampler.num_sampled, columns.partial_fc.num_sampled)
        num_drawn += int(np.prod(columns.sampled_values.sampled.shape or [0])) + num_labels
        if columns.sampler.kind == loss_pb2.Sampler.KIND_ALL:
            num_drawn = self.spec.num_classes
        return min(self.spec.num_classes, num_drawn + num_labels)

    def sample_candidates(
        self,
        num_sampled: int,
        *,
        sampler: str | types.FixedUnigram | types.Mixture = "log_uniform",
        unique: bool = True,
        seed: int = 0,
        step: int = 0,
        labels: Array | None = None,
    ) -> types.Candidates:
        """The candidates of (seed, step) and the expected counts of them and of labels [N, T]; changes nothing.

        Raises:
            InvalidArgument: naming the field, as num_sampled above the number of classes where unique.
        """
        loss = types.SampledSoftmax(num_sampled=num_sampled, sampler=sampler, unique=unique, seed=seed)
        request = loss_pb2.SampleCandidatesRequest(table=self.name, sampler=messages.sampler(loss), step=step)
        if labels is not None:
            request.labels.CopyFrom(numbers(labels, "labels"))
        return messages.candidates(self.client.channel.unary(self.client.losses.SampleCandidates, request, None))

    def sampling_gap(
        self,
        hidden: Array,
        labels: Array,
        loss: types.SampledSoftmax,
        *,
        step: int = 0,
        ignore_index: int | None = -100,
    ) -> types.SamplingGap:
        """The sampled loss of hidden [N, D] with labels [N], beside the exact one; changes nothing.

        step keys the sampler. Two requests: where the table moved between them both are repeated, GAP_TRIES times in
        all; the answer says which versions it is of.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as `compute_loss`.
        """
        hidden, labels = of_rank(hidden, 2, "hidden"), of_rank(labels, 1, "labels")
        tries = (self._sampling_gap(hidden, labels, loss, step, ignore_index) for _ in range(GAP_TRIES))
        for gap in tries:
            if gap.is_one_version:
                break
        return gap

    def _sampling_gap(
        self, hidden: Array, labels: Array, loss: types.SampledSoftmax, step: int, ignore_index: int | None
    ) -> types.SamplingGap:
        sampled = self.compute_loss(hidden, labels, loss, step=step, ignore_index=ignore_index)
        exact = self.evaluate(hidden, labels, want_rank=False, ignore_index=ignore_index, logits=loss.logits)
        if sampled.loss is None or exact.counted is None:
            raise BadReply("the reply holds no loss")
        versions = sampled.version, exact.version, exact.last_version
        return types.SamplingGap(sampled.loss, exact.loss, exact.counted, *versions)

    def read_rows(self, class_ids: Array) -> types.Rows:
        """Rows [M, D] and biases [M] of class_ids [M], in pages; `version` is the last page's.

        Raises:
            InvalidArgument, TransientError, RowsLost: as `evaluate`.
        """
        class_ids = of_rank(class_ids, 1, "class_ids")

        def ask(page: slice) -> types.Rows:
            request = table_pb2.ReadRowsRequest(table=self.name, class_ids=numbers(class_ids[page], "class_ids"))
            return messages.rows(self.client.channel.unary(self.client.tables.ReadRows, request, None))

        found = [asked(ask, page) for page in pages(len(class_ids), self.spec.dim + 1)]
        biases = joined([page.biases for page in found])
        return types.Rows(np.concatenate([page.rows for page in found]), biases, found[-1].version)

    def embeddings(self, class_ids: Array | Tensor) -> LazyRows:
        """The rows of class_ids [C] as a lookup that is never fetched, for `shardloss.compat.tfrs.Retrieval`.

        Raises:
            InvalidArgument: they are not a list of class ids of the table.
        """
        return lazy_rows(self, class_ids)

    def write_rows(self, class_ids: Array, rows: Array, biases: Array | None = None) -> int:
        """Overwrite rows [M, D] (and biases [M]) of distinct class_ids [M]; one version a page; returns the last.

        A page whose reply is lost is written again: what another trainer committed to these rows between is lost.

        Raises:
            InvalidArgument: before anything is written.
        """
        class_ids, rows = np.asarray(class_ids), np.asarray(rows)
        biases = None if biases is None else np.asarray(biases)
        check_rows(class_ids, rows, biases, self.spec)

        def ask(page: slice) -> int:
            request = table_pb2.WriteRowsRequest(
                table=self.name, class_ids=numbers(class_ids[page], "class_ids"), rows=numbers(rows[page], "rows")
            )
            if biases is not None:
                request.biases.CopyFrom(numbers(biases[page], "biases"))
            reply: table_pb2.WriteRowsResponse = self.client.channel.unary(self.client.tables.WriteRows, request, None)
            return reply.version

        return [asked(ask, page) for page in pages(len(class_ids), self.spec.dim + 1)][-1]

    def write_class_counts(self, counts: Array) -> None:
        """Give the class counts [V] that `FixedUnigram` samplers draw by, >= 0; in pages.

        Raises:
            InvalidArgument, LimitExceeded: before anything is written.
        """
        counts = of_rank(counts, 1, "counts").astype(np.float64)
        if len(counts) != self.spec.num_classes:
            raise InvalidArgument(f"counts has {len(counts)} of {self.spec.num_classes} classes", field="counts")
        refuse_where(~(np.isfinite(counts) & (counts >= 0)), "counts", "is not a finite number >= 0")
        for page in pages(len(counts), 1):
            request = table_pb2.WriteClassCountsRequest(
                table=self.name, first_class=page.start, counts=numbers(counts[page], "counts")
            )
            self.client.channel.unary(self.client.tables.WriteClassCounts, request, None)


def check_rows(class_ids: Array, rows: Array, biases: Array | None, spec: types.TableInfo) -> None:
    """Refuse rows that do not fit their ids, or ids that are not distinct classes: pages alone would not show it."""
    if class_ids.ndim != 1 or rows.shape != (len(class_ids), spec.dim):
        raise InvalidArgument(
            f"rows {rows.shape} do not fit class_ids {class_ids.shape}; [M, {spec.dim}]", field="rows"
        )
    if biases is not None and biases.shape != class_ids.shape:
        raise InvalidArgument(f"biases {biases.shape} do not fit class_ids {class_ids.shape}", field="biases")
    refuse_where((class_ids < 0) | (class_ids >= spec.num_classes), "class_ids", f"is outside [0, {spec.num_classes})")
    order = np.argsort(class_ids, kind="stable")
    repeated = np.zeros(len(class_ids), dtype=bool)
    repeated[order[1:]] = class_ids[order][1:] == class_ids[order][:-1]
    refuse_where(repeated, "class_ids", "is there twice")
    refuse_where(np.asarray(~is_storable(rows, spec.dtype).all(axis=1)), "rows", f"is not finite in {spec.dtype}")
    if biases is not None:
        wide = "float64" if spec.dtype == "float64" else "float32"
        refuse_where(~is_storable(biases, wide), "biases", f"is not finite in {wide}")


def is_storable(values: Array, dtype: str) -> Array:
    """Whether values are finite in a table's dtype."""
    most = LARGEST[dtype]
    return np.asarray(np.isfinite(values) & (np.abs(values) <= most))


def refuse_where(wrong: Array, field: str, complaint: str) -> None:
    """Refuse where any entry [M] is wrong, naming the first."""
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InvalidArgument(f"{field}[{index}] {complaint}", field=field, index=index)
