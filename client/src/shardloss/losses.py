"""Losses of a table for NumPy arrays: scored alone, or as steps of a session."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardloss import chunks, messages, types
from shardloss.channel import single
from shardloss.errors import BadReply, InvalidArgument, LimitExceeded
from shardloss.messages import Numbers, numbers
from shardloss.paging import of_rank
from shardloss.questions import Questions
from shardloss.splice import Spliced
from shardloss.v1 import loss_pb2
from shardloss.wire import NUMPY_DTYPES, Array

GAP_TRIES = 3


class Losses(Questions):
    """The losses of a `Table`, and the candidates they draw."""

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
        grad_dtype: str | None = None,
        want_cost: bool = False,
    ) -> types.LossResult:
        """Score hidden [N, D] with labels [N] or [N, T] without opening a ticket or changing the table.

        label_weights [N, T] apply to losses over all classes; None is 1/T (1 in a full sigmoid, where
        the weights of one class in a row add up to its target, at most 1). Labels equal to
        ignore_index do not count. A FullSoftmax also accepts a label_distribution [N, V] in place of labels, which are
        then None: a weight >= 0 for every class, streamed in columns without those that are zero. step keys the
        sampler. want_table_grad requests the gradient of sum(upstream [N] * loss) with respect to the rows, for callers
        with their own optimizer; want_scale_grad requests that of each loss with respect to the logits' scale. Losses
        are in nats. grad_dtype is the dtype in which the gradient of hidden is sent, None for the table's compute
        dtype; bfloat16 is widened to float32 on receipt. want_cost requests the cost of the call. If hidden is a NumPy
        array, it is sent from its own memory, which must not change until the call returns.

        Raises:
            InvalidArgument: a field is invalid; the error names the field and the first offending index.
            LimitExceeded: the request is larger than the server accepts; split the batch.
            TransientError: the server did not answer in time or is at its limits; repeat the call.
            RowsLost: a worker died with rows of this table.
        """
        request = messages.loss_request(
            self.reference,
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
            grad_dtype=grad_dtype,
            want_cost=want_cost,
        )
        request.message.step = step
        return self._send_loss(request, label_distribution)

    def _send_loss(
        self, request: Spliced[loss_pb2.ComputeLossRequest], label_distribution: Array | None = None
    ) -> types.LossResult:
        """Send a request as one message, or in chunks if the request or its reply is too large for one message.

        Raises:
            ShardlossError: as in `compute_loss`.
        """
        channel, limits = self.client.channel, self.client.info.limits
        limit, chunk = int(limits["max_message_bytes"]), int(limits["max_chunk_bytes"])
        columns = None
        if label_distribution is not None or request.message.label_columns:
            columns = self._checked_distribution(request.message, label_distribution)
        elif max(request.ByteSize(), self._reply_bytes(request.message)) <= limit:
            reply = channel.unary(self.client.send_loss, request, None)
            return messages.loss_result(reply.message, {"hidden_grad": reply.content} if reply.content else None)

        def pieces() -> Iterator[Spliced[loss_pb2.StreamLossRequest]]:
            header, parts = chunks.detach(request, "hidden", chunk)
            yield Spliced(loss_pb2.StreamLossRequest(header=header))
            for part in parts:
                yield chunks.spliced(part, loss_pb2.StreamLossRequest)
            if columns is not None:
                for piece in messages.label_columns(columns, chunk):
                    yield Spliced(loss_pb2.StreamLossRequest(columns=piece))

        replies = channel.stream(self.client.stream_loss, pieces, None)
        with messages.reading_reply():
            header = single(replies, "header")
            assembler = chunks.Assembler(header, 2 * int(limits["max_reply_bytes"]), chunk)
            for reply in replies[1:]:
                assembler.add(chunks.piece_of(reply))
            return messages.loss_result(header, assembler.contents())

    def _checked_distribution(self, request: loss_pb2.ComputeLossRequest, distribution: Array | None) -> Array:
        """Return a label distribution [N, V] as an array after checking that each column fits in one piece of a stream.

        Raises:
            InvalidArgument: the distribution is missing, is given in addition to labels, or has a wrong dtype or shape.
            LimitExceeded: a column is too large because there are too many rows.
        """
        if distribution is None or not request.label_columns:
            raise InvalidArgument("pass either labels or a label_distribution", field="labels")
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
        """Return an upper bound on the size of the reply in bytes.

        lse and class ids take 8 bytes each; other values have the table's compute dtype or grad_dtype.
        """
        num_rows, dim = next(iter(request.hidden.shape), 0), self.spec.dim
        width = 8 if self.spec.dtype == "float64" else 4
        of_grad = NUMPY_DTYPES[request.grad_dtype].itemsize if request.grad_dtype else width
        num_bytes = 24 * num_rows + (num_rows * dim * of_grad if request.want_hidden_grad else 0)
        if request.want_table_grad:
            num_bytes += self._num_touched(request) * ((dim + 1) * width + 8)
        return num_bytes + 4096

    def _num_touched(self, request: loss_pb2.ComputeLossRequest) -> int:
        """Return an upper bound on the number of rows with a gradient."""
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
        """Return the candidates of (seed, step) with their expected counts and those of labels [N, T].

        The call does not change the table.

        Raises:
            InvalidArgument: a field is invalid, for example num_sampled > num_classes with unique=True; the error names
                the field.
        """
        loss = types.SampledSoftmax(num_sampled=num_sampled, sampler=sampler, unique=unique, seed=seed)
        request = loss_pb2.SampleCandidatesRequest(table=self.reference, sampler=messages.sampler(loss), step=step)
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
        """Return the sampled and the exact loss of hidden [N, D] with labels [N], without changing the table.

        step keys the sampler. The losses are two requests. If the table changes between them, both are repeated, up to
        GAP_TRIES tries in total; the result reports the versions of both losses.

        Raises:
            InvalidArgument, LimitExceeded, TransientError, RowsLost: as in `compute_loss`.
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
            raise BadReply("the reply contains no loss")
        versions = sampled.version, exact.version, exact.last_version
        return types.SamplingGap(sampled.loss, exact.loss, exact.counted, *versions)
