"""What trainers call: a connection, its tables, and sessions that train them. NumPy in and out; torch only in heads."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from shardloss import chunks, messages, types, wire
from shardloss.channel import Channel, single
from shardloss.errors import InvalidArgument
from shardloss.v1 import (
    evaluation_pb2,
    evaluation_pb2_grpc,
    loss_pb2,
    loss_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    table_pb2,
    table_pb2_grpc,
    tensor_pb2,
)
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.autograd import SampledSoftmaxHead, SoftmaxHead

PAGE_BYTES = 1 << 20  # rows and questions go in pages of about this size
RECORD_BYTES = 8  # an estimate of reply bytes an element needs
MANY_S = 600.0  # deadline of calls that fill a whole table

T = TypeVar("T")


def connect(address: str, *, timeout_s: float = 60.0, attempt_timeout_s: float = 20.0) -> LossClient:
    """Connect to a server ("host:port") and read its limits.

    timeout_s bounds every call with all its retries; attempt_timeout_s one try of it.

    Raises:
        ServerUnavailable, DeadlineExceeded: no server answers there.
    """
    return LossClient(address, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s)


class LossClient:
    """A connection to a server. Thread-safe; a context manager. Every call has a deadline and retries transient errors."""

    def __init__(self, address: str, *, timeout_s: float = 60.0, attempt_timeout_s: float = 20.0) -> None:
        self.address = address
        self.channel = Channel(address, timeout_s, attempt_timeout_s)
        self.losses = self.channel.stub(loss_pb2_grpc.LossServiceStub)
        self.tables = self.channel.stub(table_pb2_grpc.TableServiceStub)
        self.questions = self.channel.stub(evaluation_pb2_grpc.EvaluationServiceStub)
        self._server = self.channel.stub(server_pb2_grpc.ServerServiceStub)
        try:
            self.info = self.server_info()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LossClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Open tickets stay with the server until they expire. Idempotent."""
        self.channel.close()

    def server_info(self) -> types.ServerInfo:
        """Version, features and limits of the server."""
        request = server_pb2.GetServerInfoRequest()
        return messages.server_info(self.channel.unary(self._server.GetServerInfo, request, None))

    def create_table(
        self,
        name: str,
        *,
        num_classes: int,
        dim: int,
        dtype: str = "float32",
        bias: bool = True,
        num_shards: int = 0,
        placement: str = "div",
        initializer: types.Initializer | None = None,
        optimizer: types.Optimizer | None = None,
        timeout_s: float = MANY_S,
    ) -> Table:
        """Make a table of num_classes V rows of dim D, or take the one that exists with an equal spec.

        num_shards 0 is one a worker; initializer None is uniform on +-1/sqrt(D); optimizer None is plain SGD.

        Raises:
            TableExists: the name is taken by another spec.
            InvalidArgument, LimitExceeded: the spec is wrong or too large.
        """
        spec = messages.table_spec(
            name, num_classes, dim, dtype, bias, num_shards, placement, initializer, optimizer
        )
        request = table_pb2.CreateTableRequest(spec=spec)
        reply = self.channel.unary(self.tables.CreateTable, request, timeout_s, whole=True)
        return Table(self, messages.table_info(reply.table))

    def table(self, name: str) -> Table:
        """A table that exists.

        Raises:
            TableNotFound: there is none of that name.
        """
        request = table_pb2.GetTableRequest(table=name)
        return Table(self, messages.table_info(self.channel.unary(self.tables.GetTable, request, None)))

    def list_tables(self) -> list[types.TableInfo]:
        """All tables by name."""
        reply = self.channel.unary(self.tables.ListTables, table_pb2.ListTablesRequest(), None)
        return [messages.table_info(table) for table in reply.tables]

    def delete_table(self, name: str) -> None:
        """Free a table with all its tickets.

        Raises:
            TableNotFound: there is none of that name.
        """
        self.channel.unary(self.tables.DeleteTable, table_pb2.DeleteTableRequest(table=name), None)


class Table:
    """One table of a server: heads that train it, exact questions, rows."""

    def __init__(self, client: LossClient, info: types.TableInfo) -> None:
        self.client, self.spec = client, info
        self.name = info.name

    def info(self) -> types.TableInfo:
        """The table as it stands now."""
        return self.client.table(self.name).spec

    def softmax(
        self, *, reduction: str = "mean", ignore_index: int | None = -100, learning_rate: float | None = None
    ) -> SoftmaxHead:
        """A torch.nn.Module of the exact softmax loss over all classes; see `shardloss.autograd.SoftmaxHead`."""
        from shardloss.autograd import SoftmaxHead

        return SoftmaxHead(self, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)

    def sampled_softmax(
        self,
        num_sampled: int = 0,
        *,
        sampler: str = "log_uniform",
        unique: bool = True,
        seed: int | None = None,
        remove_accidental_hits: bool = True,
        hit_removal: str = "every",
        reduction: str = "mean",
        ignore_index: int | None = -100,
        learning_rate: float | None = None,
    ) -> SampledSoftmaxHead:
        """A torch.nn.Module of the sampled softmax loss; see `shardloss.autograd.SampledSoftmaxHead`."""
        from shardloss.autograd import SampledSoftmaxHead, fresh_seed

        loss = types.SampledSoftmax(
            num_sampled=num_sampled,
            sampler=sampler,
            unique=unique,
            seed=fresh_seed() if seed is None else seed,
            remove_accidental_hits=remove_accidental_hits,
            hit_removal=hit_removal,
        )
        return SampledSoftmaxHead(
            self, loss, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate
        )

    def session(self) -> Session:
        """A new session: the steps of one trainer."""
        return Session(self, secrets.token_hex(16))

    def compute_loss(
        self,
        hidden: Array,
        labels: Array,
        loss: types.Loss,
        *,
        step: int = 0,
        label_weights: Array | None = None,
        ignore_index: int | None = None,
        upstream: Array | None = None,
        want_lse: bool = False,
        want_hidden_grad: bool = False,
        want_table_grad: bool = False,
    ) -> types.LossResult:
        """Score hidden [N, D] with labels [N] or [N, T]; opens no ticket and changes nothing.

        step keys the sampler. want_table_grad asks for the gradient of sum(upstream * loss) in the rows, for callers
        who own the optimizer.
        """
        request = LossCall(
            hidden, labels, loss, label_weights, ignore_index, upstream, want_lse, want_hidden_grad, want_table_grad
        ).message(self.name)
        request.step = step
        return self.send_loss(request)

    def send_loss(self, request: loss_pb2.ComputeLossRequest) -> types.LossResult:
        """Send a request as one message, or in chunks where it or its reply is too large for one."""
        channel, limits = self.client.channel, self.client.info.limits
        limit = int(limits["max_message_bytes"])
        if max(request.ByteSize(), self._reply_bytes(request)) <= limit:
            return messages.loss_result(channel.unary(self.client.losses.ComputeLoss, request, None))

        def pieces() -> Iterator[loss_pb2.StreamLossRequest]:
            header, parts = chunks.detach(request, int(limits["max_chunk_bytes"]))
            yield loss_pb2.StreamLossRequest(header=header)
            for chunk in parts:
                yield loss_pb2.StreamLossRequest(chunk=chunk)

        replies = channel.stream(self.client.losses.StreamLoss, pieces, None)
        header = single(replies, "header")
        assembler = chunks.Assembler(header, int(limits["max_reply_bytes"]) * 2)
        for piece in replies[1:]:
            assembler.add(piece.chunk)
        return messages.loss_result(header, assembler.contents())

    def _reply_bytes(self, request: loss_pb2.ComputeLossRequest) -> int:
        num_rows, dim = request.hidden.shape[0], self.spec.dim
        elements = 2 * num_rows + (num_rows * dim if request.want_hidden_grad else 0)
        if request.want_table_grad:
            num_touched = self.spec.num_classes
            if request.WhichOneof("loss") == "sampled_softmax":
                sampled = request.sampled_softmax
                num_sampled = sampled.sampler.num_sampled or sum(sampled.sampled_values.sampled.shape)
                num_touched = min(num_touched, num_sampled + int(np.prod(request.labels.shape)))
            elements += num_touched * (dim + 2)
        return elements * RECORD_BYTES + 4096

    def sample_candidates(
        self,
        num_sampled: int,
        *,
        sampler: str = "log_uniform",
        unique: bool = True,
        seed: int = 0,
        step: int = 0,
        labels: Array | None = None,
    ) -> types.Candidates:
        """The candidates of (seed, step) and the expected counts of them and of labels [N, T]."""
        loss = types.SampledSoftmax(num_sampled=num_sampled, sampler=sampler, unique=unique, seed=seed)
        request = loss_pb2.SampleCandidatesRequest(table=self.name, sampler=messages.sampler(loss), step=step)
        if labels is not None:
            request.labels.CopyFrom(wire.encode(np.asarray(labels)))
        return messages.candidates(self.client.channel.unary(self.client.losses.SampleCandidates, request, None))

    def evaluate(
        self, hidden: Array, labels: Array, *, want_rank: bool = True, ignore_index: int | None = -100
    ) -> types.Evaluation:
        """Exact negative log likelihood and rank over all classes of hidden [N, D] with labels [N], in pages."""

        def ask(page: slice) -> types.Evaluation:
            request = evaluation_pb2.EvaluateRequest(
                table=self.name,
                hidden=numbers(hidden[page]),
                labels=numbers(labels[page]),
                want_rank=want_rank,
                ignore_index=ignore_index,
            )
            return messages.evaluation(self._ask(self.client.questions.Evaluate, request))

        pages = [ask(page) for page in self._pages(len(hidden))]
        rank = np.concatenate([page.rank for page in pages if page.rank is not None]) if want_rank else None
        loss = np.concatenate([page.loss for page in pages])
        return types.Evaluation(loss, rank, pages[0].version, pages[-1].last_version)

    def top_k(self, hidden: Array, k: int, *, want_log_probs: bool = True) -> types.TopK:
        """The k best classes of hidden [N, D]: logit descending, ties by lower id; in pages."""

        def ask(page: slice) -> types.TopK:
            request = evaluation_pb2.TopKRequest(
                table=self.name, hidden=numbers(hidden[page]), k=k, want_log_probs=want_log_probs
            )
            return messages.top_k(self._ask(self.client.questions.TopK, request))

        pages = [ask(page) for page in self._pages(len(hidden), 3 * k)]
        return types.TopK(
            np.concatenate([page.class_ids for page in pages]),
            np.concatenate([page.logits for page in pages]),
            joined([page.log_probs for page in pages]),
            pages[0].version,
            pages[-1].last_version,
        )

    def score(self, hidden: Array, class_ids: Array, *, want_log_probs: bool = False) -> types.Scores:
        """Logits of class_ids [S] (shared) or [N, S] under hidden [N, D]; in pages."""
        class_ids = np.asarray(class_ids)

        def ask(page: slice) -> types.Scores:
            asked = class_ids[page] if class_ids.ndim == 2 else class_ids
            request = evaluation_pb2.ScoreRequest(
                table=self.name, hidden=numbers(hidden[page]), class_ids=numbers(asked), want_log_probs=want_log_probs
            )
            return messages.scores(self._ask(self.client.questions.Score, request))

        pages = [ask(page) for page in self._pages(len(hidden), 3 * class_ids.shape[-1])]
        logits = np.concatenate([page.logits for page in pages])
        log_probs = joined([page.log_probs for page in pages])
        return types.Scores(logits, log_probs, pages[0].version, pages[-1].last_version)

    def read_rows(self, class_ids: Array) -> types.Rows:
        """Rows [M, D] and biases [M] of class_ids [M], in pages; `version` is the last page's."""

        def ask(page: slice) -> types.Rows:
            request = table_pb2.ReadRowsRequest(table=self.name, class_ids=numbers(np.asarray(class_ids)[page]))
            return messages.rows(self.client.channel.unary(self.client.tables.ReadRows, request, None))

        pages = [ask(page) for page in self._pages(len(class_ids))]
        biases = joined([page.biases for page in pages])
        return types.Rows(np.concatenate([page.rows for page in pages]), biases, pages[-1].version)

    def write_rows(self, class_ids: Array, rows: Array, biases: Array | None = None) -> int:
        """Overwrite rows [M, D] (and biases [M]) of class_ids [M]; one version a page; returns the last."""

        def ask(page: slice) -> int:
            request = table_pb2.WriteRowsRequest(
                table=self.name, class_ids=numbers(np.asarray(class_ids)[page]), rows=numbers(rows[page])
            )
            if biases is not None:
                request.biases.CopyFrom(numbers(biases[page]))
            return self.client.channel.unary(self.client.tables.WriteRows, request, None).version

        return [ask(page) for page in self._pages(len(class_ids))][-1]

    def _ask(self, method: Callable[..., T], request: object) -> T:
        return self.client.channel.unary(method, request, None, whole=True)

    def _pages(self, num_rows: int, width: int = 0) -> Iterator[slice]:
        """Slices of rows of about PAGE_BYTES; one empty slice for no rows."""
        size = max(1, PAGE_BYTES // (8 * (self.spec.dim + 1 + width)))
        for start in range(0, max(num_rows, 1), size):
            yield slice(start, start + size)


class Session:
    """The steps of one trainer on one table. Steps begin at 1 and only grow; not thread-safe."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name = table, name
        self.step = 1
        self.num_parts = 0

    def compute_loss(
        self,
        hidden: Array | tensor_pb2.Tensor,
        labels: Array,
        loss: types.Loss,
        *,
        label_weights: Array | None = None,
        ignore_index: int | None = None,
        want_lse: bool = False,
        want_hidden_grad: bool = True,
    ) -> types.LossResult:
        """Score the next part of the present step and leave its ticket open for `commit`."""
        call = LossCall(hidden, labels, loss, label_weights, ignore_index, None, want_lse, want_hidden_grad, False)
        request = self._keyed(call.message(self.table.name))
        self.num_parts += 1
        return self.table.send_loss(request)

    def commit(
        self,
        parts: Sequence[tuple[types.LossResult | str, Array | None]],
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
        max_staleness: int | None = None,
    ) -> types.CommitResult:
        """One optimizer step over (result or ticket, g [N] or None for ones) of the present step, exactly once.

        After a TransientError the same commit may be repeated; it is applied once.
        """
        request = loss_pb2.CommitRequest(
            table=self.table.name,
            session=self.name,
            step=self.step,
            learning_rate=learning_rate,
            grad_scale=grad_scale,
            max_staleness=max_staleness,
        )
        for part, g in parts:
            ticket = part if isinstance(part, str) else part.ticket
            message = request.parts.add(ticket=ticket)
            if g is not None:
                message.g.CopyFrom(numbers(g))
        channel = self.table.client.channel
        result = messages.commit_result(channel.unary(self.table.client.losses.Commit, request, None))
        self._next_step()
        return result

    def train_step(
        self,
        hidden: Array,
        labels: Array,
        loss: types.Loss,
        *,
        learning_rate: float,
        upstream: Array | None = None,
        label_weights: Array | None = None,
        ignore_index: int | None = None,
        want_hidden_grad: bool = True,
    ) -> types.LossResult:
        """Score and commit in one call: the table's objective is sum(upstream * loss), upstream None is ones."""
        call = LossCall(hidden, labels, loss, label_weights, ignore_index, upstream, False, want_hidden_grad, False)
        request = self._keyed(call.message(self.table.name))
        request.commit_now.learning_rate = learning_rate
        result = self.table.send_loss(request)
        self._next_step()
        return result

    def abort(self) -> int:
        """Give up the present step's tickets, as if its losses had never been computed; the number given up."""
        if self.num_parts == 0:
            return 0
        request = loss_pb2.AbortRequest(table=self.table.name, session=self.name, step=self.step)
        reply = self.table.client.channel.unary(self.table.client.losses.Abort, request, None)
        self._next_step()
        return reply.num_aborted

    def _keyed(self, request: loss_pb2.ComputeLossRequest) -> loss_pb2.ComputeLossRequest:
        request.session, request.step, request.part = self.name, self.step, self.num_parts
        return request

    def _next_step(self) -> None:
        self.step += 1
        self.num_parts = 0


class LossCall:
    """The arguments of one loss, as its message."""

    def __init__(
        self,
        hidden: Array | tensor_pb2.Tensor,
        labels: Array,
        loss: types.Loss,
        label_weights: Array | None,
        ignore_index: int | None,
        upstream: Array | None,
        want_lse: bool,
        want_hidden_grad: bool,
        want_table_grad: bool,
    ) -> None:
        self._message = loss_pb2.ComputeLossRequest(
            hidden=numbers(hidden),
            labels=numbers(labels),
            ignore_index=ignore_index,
            want_lse=want_lse,
            want_hidden_grad=want_hidden_grad,
            want_table_grad=want_table_grad,
        )
        messages.set_loss(self._message, loss)
        if label_weights is not None:
            self._message.label_weights.CopyFrom(numbers(label_weights))
        if upstream is not None:
            self._message.upstream.CopyFrom(numbers(upstream))

    def message(self, table: str) -> loss_pb2.ComputeLossRequest:
        """The request, for one table."""
        self._message.table = table
        return self._message


def numbers(array: Array | tensor_pb2.Tensor) -> tensor_pb2.Tensor:
    """The message of an array; a message passes (bfloat16 comes so)."""
    if isinstance(array, tensor_pb2.Tensor):
        return array
    if not isinstance(array, (np.ndarray, list, tuple)):
        raise InvalidArgument(f"a NumPy array is needed, not {type(array).__name__}")
    return wire.encode(np.asarray(array))


def joined(pages: Sequence[Array | None]) -> Array | None:
    """Pages in one array; None where they are None."""
    present = [page for page in pages if page is not None]
    return np.concatenate(present) if present else None
