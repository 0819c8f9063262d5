"""The gRPC services: each method decodes its request, calls the front end and encodes the reply."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeVar

import grpc
import torch
from shardloss import chunks
from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss.splice import Spliced
from shardloss.v1 import (
    evaluation_pb2,
    evaluation_pb2_grpc,
    loss_pb2,
    loss_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    table_pb2,
    table_pb2_grpc,
)

from shardloss_server import __version__, metrics
from shardloss_server.config import FRAMING_BYTES, Limits
from shardloss_server.evaluation.passes import Ask, Evaluator
from shardloss_server.frontend import validate
from shardloss_server.frontend.admission import Admission, LiveStream, LiveStreams, Unsent
from shardloss_server.frontend.catalog import Catalog
from shardloss_server.frontend.deadline import Deadline
from shardloss_server.frontend.pipeline import Pipeline
from shardloss_server.frontend.plan import draw_with_tries
from shardloss_server.frontend.request import CommitReply, LabelColumns, LossReply, LossRequest
from shardloss_server.numerics.optimizer import state_widths
from shardloss_server.rpc import specs, wire
from shardloss_server.rpc.call import Call, CallLog, Sized
from shardloss_server.rpc.caller import caller_of

M = TypeVar("M", bound=Sized)
Context = grpc.ServicerContext
LossMessage = Spliced[loss_pb2.ComputeLossRequest]
StreamMessage = Spliced[loss_pb2.StreamLossRequest]
StreamReply = Spliced[loss_pb2.StreamLossResponse]
Question = (
    evaluation_pb2.EvaluateRequest
    | evaluation_pb2.TopKRequest
    | evaluation_pb2.ScoreRequest
    | evaluation_pb2.SampleClassesRequest
)
FEATURES = (
    "bfloat16_tables",
    "class_counts",
    "evaluate",
    "full_sigmoid",
    "full_softmax",
    "hard_negatives",
    "in_batch",
    "label_columns",
    "margin",
    "one_call",
    "partial_fc",
    "sample_classes",
    "sampled_logistic",
    "sampled_softmax",
    "stream_loss",
    "table_state",
    "top_k",
)


class Handlers:
    """The objects that all services share: the front end, admission, and the log that turns errors into statuses."""

    def __init__(self, catalog: Catalog, limits: Limits, streams: LiveStreams, call_log: CallLog) -> None:
        self.catalog, self.limits, self.streams, self.call_log = catalog, limits, streams, call_log
        message = limits.max_message_bytes
        most_calls, most_commits = limits.max_calls_in_flight, limits.max_commits_in_flight
        self.admission = Admission(most_calls, most_calls * message, "max_calls_in_flight")
        self.commits = Admission(most_commits, most_commits * message, "max_commits_in_flight")
        self.stream_bytes = Admission(limits.max_streams, 2 * limits.max_request_bytes, "max_streams")
        self.unsent = Unsent(most_calls * message, limits.max_message_s)
        self.pipeline = Pipeline(catalog, limits)
        self.evaluator = Evaluator(catalog, limits)

    @property
    def places(self) -> Mapping[str, Admission]:
        """The places that calls of each kind hold, by the name that an operator sees."""
        return {"calls": self.admission, "commits": self.commits, "streams": self.stream_bytes}

    def admitted(self, method: str, num_bytes: int, caller: str) -> AbstractContextManager[None]:
        """Return a context that holds a place for a unary call; refuse a caller that leaves too many replies unread."""
        if method in ("GetServerInfo", "GetStatus"):
            return nullcontext()
        self.unsent.refuse_unread(caller)
        return (self.commits if method in ("Commit", "Abort") else self.admission).admit(num_bytes, caller)

    def deadline(self, context: Context, request: object = None, *, is_capped: bool = True) -> Deadline:
        """Return the caller's deadline, which is cancelled when the caller goes away.

        It is at most max_deadline_s away; if not is_capped, only a caller without a deadline gets that one.
        """
        left = context.time_remaining()
        longest = self.limits.max_deadline_s
        seconds = longest if left is None else min(left, longest) if is_capped else left
        deadline = Deadline.after(seconds, caller_of(context, request))
        if not context.add_callback(deadline.cancel):
            deadline.cancel()
        return deadline

    def note_loss(self, method: str, request: LossRequest, reply: LossReply) -> None:
        """Count a loss, and its commit if it made one."""
        counted = self.call_log.metrics
        if reply.replayed:
            counted.count(metrics.REPLAYS, method)
        else:
            counted.count(metrics.LOSS_ROWS, by=len(request.hidden))
            if reply.committed is not None:
                self.note_commit(method, reply.committed)

    def note_commit(self, method: str, reply: CommitReply) -> None:
        """Count a commit."""
        if reply.replayed:
            self.call_log.metrics.count(metrics.REPLAYS, method)
        else:
            self.call_log.metrics.observe(metrics.STALENESS, reply.staleness)


def answers(method: Callable[[Any, Any, Context], M]) -> Callable[[Any, Any, Context], M]:
    """Admit a unary call, run it without autograd, and add its cost to the reply if requested.

    Commits and aborts have places of their own, since they release what other calls wait for. GetServerInfo and
    GetStatus need no place.
    """
    name = method.__name__

    @functools.wraps(method)
    def handler(self: Any, request: Any, context: Context) -> M:
        handlers: Handlers = self.handlers
        limit, caller = handlers.limits.max_message_bytes + FRAMING_BYTES, caller_of(context, request)
        with (
            handlers.call_log.begin(name, context, request) as call,
            handlers.admitted(name, call.received_bytes, caller),
        ):
            with torch.inference_mode():
                response = method(self, request, context)
            if call.sending(response).sent_bytes > limit:
                raise LimitExceeded("the reply exceeds max_message_bytes; request less, or use StreamLoss")
            handlers.unsent.hand_over(call.sent_bytes, context.cancel, context.add_callback, caller)
            add_cost(call, request, response)
            return response
        raise AssertionError("a failed call has ended")

    return handler


def add_cost(call: Call, request: Any, response: Any) -> None:
    """Add the cost of a call to its reply if the request asks for it."""
    if getattr(getattr(request, "message", request), "want_cost", False):
        getattr(response, "message", response).call_cost.CopyFrom(call.cost(call.sent_bytes))


class LossServicer(loss_pb2_grpc.LossServiceServicer):
    """The servicer of LossService."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @answers
    def ComputeLoss(self, request: LossMessage, context: Context) -> Spliced[loss_pb2.ComputeLossResponse]:
        contents = {} if request.content is None else {"hidden": request.content}
        return self._loss(request.message, contents, False, context)

    def StreamLoss(self, request_iterator: Iterator[StreamMessage], context: Context) -> Iterator[StreamReply]:
        call_log, streams, caller = self.handlers.call_log, self.handlers.streams, caller_of(context)
        with call_log.begin("StreamLoss", context) as call, streams.stream(context.cancel, caller) as stream:
            pieces_in = call.receiving(request_iterator)
            header, assembler = self._begin(pieces_in)
            num_bytes = sum(tensor.chunk.num_bytes for _, tensor in chunks.tensors_of(header))
            with self.handlers.stream_bytes.admit(num_bytes, caller):
                deadline = self.handlers.deadline(context, header)
                columns = self._receive(header, pieces_in, assembler, stream, deadline)
                stream.working()
                with torch.inference_mode():
                    response = self._loss(header, assembler.contents(), True, context, columns)
                add_cost(call.sending(response), header, response)
                reply, pieces = chunks.detach(response, "hidden_grad", self.handlers.limits.max_chunk_bytes)
                stream.moved()
                yield Spliced(loss_pb2.StreamLossResponse(header=reply))
                for piece in pieces:
                    stream.moved()
                    yield chunks.spliced(piece, loss_pb2.StreamLossResponse)

    def _begin(self, pieces: Iterator[StreamMessage]) -> tuple[loss_pb2.ComputeLossRequest, chunks.Assembler]:
        """Return the header of a stream, and an assembler for the chunks that it announces."""
        first = next(pieces, None)
        if first is None or first.message.WhichOneof("piece") != "header":
            raise InvalidArgument("a StreamLoss must begin with a header", field="piece")
        limits, header = self.handlers.limits, first.message.header
        return header, chunks.Assembler(header, limits.max_request_bytes, limits.max_chunk_bytes)

    def _receive(
        self,
        header: loss_pb2.ComputeLossRequest,
        pieces: Iterator[StreamMessage],
        assembler: chunks.Assembler,
        stream: LiveStream,
        deadline: Deadline,
    ) -> Iterator[LabelColumns]:
        """Read all chunks of a stream; return its label columns, to be read as they arrive."""
        first = None
        while not (header.label_columns and assembler.is_complete):
            piece = next(pieces, None)
            if piece is None:
                break
            stream.moved()
            deadline.check("the request had arrived")
            kind = piece.message.WhichOneof("piece")
            if kind == "columns" and header.label_columns:
                first = piece
                break
            assembler.add(chunks.piece_of(piece))
        return self._columns(first, pieces, stream, deadline)

    def _columns(
        self,
        first: StreamMessage | None,
        pieces: Iterator[StreamMessage],
        stream: LiveStream,
        deadline: Deadline,
    ) -> Iterator[LabelColumns]:
        """Yield label columns piece by piece; the client must not pause for too long between two pieces."""
        most = self.handlers.limits.max_chunk_bytes
        stream.moved()
        for piece in chain(() if first is None else (first,), pieces):
            stream.working()
            deadline.check("the labels had arrived")
            if piece.message.WhichOneof("piece") != "columns":
                raise InvalidArgument("only label columns may follow the chunks", field="piece")
            columns = piece.message.columns
            if len(columns.weights.inline) > most:
                message = f"label columns of {len(columns.weights.inline)} bytes exceed max_chunk_bytes = {most}"
                raise LimitExceeded(message, field="columns.weights")
            yield wire.label_columns(columns)
            if columns.last:
                return
            stream.moved()
        raise InvalidArgument("the stream ended before its last columns", field="columns.last")

    def _loss(
        self,
        request: loss_pb2.ComputeLossRequest,
        contents: wire.Chunks,
        is_stream: bool,
        context: Context,
        columns: Iterator[LabelColumns] | None = None,
    ) -> Spliced[loss_pb2.ComputeLossResponse]:
        limits = self.handlers.limits
        most = limits.max_reply_bytes if is_stream else min(limits.max_message_bytes, limits.max_reply_bytes)
        decoded = wire.loss_request(request, most, contents, columns)
        reply = self.handlers.pipeline.loss(decoded, self.handlers.deadline(context, request))
        self.handlers.note_loss("StreamLoss" if is_stream else "ComputeLoss", decoded, reply)
        return wire.loss_response(reply)

    @answers
    def Commit(self, request: loss_pb2.CommitRequest, context: Context) -> loss_pb2.CommitResponse:
        reply = self.handlers.pipeline.commit(wire.commit_request(request), self.handlers.deadline(context, request))
        self.handlers.note_commit("Commit", reply)
        return wire.commit_response(reply)

    @answers
    def Abort(self, request: loss_pb2.AbortRequest, context: Context) -> loss_pb2.AbortResponse:
        deadline = self.handlers.deadline(context, request)
        num_aborted = self.handlers.pipeline.abort(request.table, request.session, request.step, deadline)
        return loss_pb2.AbortResponse(num_aborted=num_aborted)

    @answers
    def SampleCandidates(
        self, request: loss_pb2.SampleCandidatesRequest, context: Context
    ) -> loss_pb2.SampleCandidatesResponse:
        owner = self.handlers.catalog.owner(request.table)
        spec = owner.spec
        draw = wire.sampler(request.sampler)
        validate.sampler(draw, spec, self.handlers.limits)
        draw = validate.filled_in(draw, spec)
        validate.at_least(request.step, 0, "step")
        if 16 * draw.num_sampled > self.handlers.limits.max_message_bytes:
            raise LimitExceeded(
                f"{draw.num_sampled} candidates do not fit in one message; request fewer", field="sampler.num_sampled"
            )
        labels = torch.zeros(0, 1, dtype=torch.int64)
        if request.HasField("labels"):
            labels = wire.column(wire.to_ids(request.labels, "labels"))
            num_rows = labels.shape[0] if labels.dim() else 0
            validate.labels(labels, num_rows, spec.num_classes, None, self.handlers.limits)
        values, num_tries = draw_with_tries(draw, spec.num_classes, request.step, labels, owner.counts)
        return loss_pb2.SampleCandidatesResponse(
            sampled=wire.from_tensor(values.sampled),
            true_expected_count=wire.from_tensor(values.true_expected_count),
            sampled_expected_count=wire.from_tensor(values.sampled_expected_count),
            num_tries=num_tries,
        )


class TableServicer(table_pb2_grpc.TableServiceServicer):
    """The servicer of TableService."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @answers
    def CreateTable(self, request: table_pb2.CreateTableRequest, context: Context) -> table_pb2.CreateTableResponse:
        spec = specs.table_spec(request.spec, len(self.handlers.catalog.group.devices))
        owner, created = self.handlers.catalog.create(spec, self.handlers.deadline(context, request, is_capped=False))
        return table_pb2.CreateTableResponse(table=specs.table_message(owner), created=created)

    @answers
    def GetTable(self, request: table_pb2.GetTableRequest, context: Context) -> table_pb2.Table:
        return specs.table_message(self.handlers.catalog.find(request.table))

    @answers
    def ListTables(self, request: table_pb2.ListTablesRequest, context: Context) -> table_pb2.ListTablesResponse:
        tables = [specs.table_message(owner) for owner in self.handlers.catalog.owners()]
        return table_pb2.ListTablesResponse(tables=tables)

    @answers
    def DeleteTable(self, request: table_pb2.DeleteTableRequest, context: Context) -> table_pb2.DeleteTableResponse:
        self.handlers.catalog.delete(request.table)
        return table_pb2.DeleteTableResponse()

    @answers
    def RenameTable(self, request: table_pb2.RenameTableRequest, context: Context) -> table_pb2.RenameTableResponse:
        owner = self.handlers.catalog.rename(request.table, request.new_name, request.replace)
        return table_pb2.RenameTableResponse(table=specs.table_message(owner))

    @answers
    def ReadRows(self, request: table_pb2.ReadRowsRequest, context: Context) -> table_pb2.ReadRowsResponse:
        owner, limits = self.handlers.catalog.owner(request.table), self.handlers.limits
        class_ids = wire.to_ids(request.class_ids, "class_ids")
        validate.id_list(class_ids, owner.spec.num_classes)
        num_tensors = 1 + (len(state_widths(owner.spec.optimizer, owner.spec.dim)) if request.want_state else 0)
        num_bytes = len(class_ids) * num_tensors * (owner.spec.dim + 1) * 8
        if num_bytes > limits.max_message_bytes:
            raise LimitExceeded(f"{len(class_ids)} rows may take {num_bytes} bytes; read fewer", field="class_ids")
        rows = owner.read(class_ids, self.handlers.deadline(context, request), request.want_state)
        response = table_pb2.ReadRowsResponse(
            rows=wire.from_tensor(rows.rows),
            version=rows.version,
            num_commits=rows.num_commits,
            weight_state=wire.from_state(rows.weight_state),
            bias_state=wire.from_state(rows.bias_state),
        )
        if owner.spec.bias:
            response.biases.CopyFrom(wire.from_tensor(rows.biases))
        return response

    @answers
    def WriteRows(self, request: table_pb2.WriteRowsRequest, context: Context) -> table_pb2.WriteRowsResponse:
        owner = self.handlers.catalog.owner(request.table)
        class_ids = wire.to_ids(request.class_ids, "class_ids")
        rows, biases = wire.to_tensor(request.rows, "rows"), wire.optional_tensor(request, "biases")
        validate.row_write(class_ids, rows, biases, owner.spec, self.handlers.limits)
        of_rows = wire.to_state(request.weight_state, "weight_state")
        of_biases = wire.to_state(request.bias_state, "bias_state")
        validate.row_state(of_rows, of_biases, len(class_ids), owner.spec)
        num_commits = request.num_commits if request.HasField("num_commits") else None
        validate.num_commits(num_commits)
        version = owner.write(
            class_ids,
            rows,
            biases,
            self.handlers.deadline(context, request),
            weight_state=of_rows,
            bias_state=of_biases,
            num_commits=num_commits,
        )
        return table_pb2.WriteRowsResponse(version=version)

    @answers
    def WriteClassCounts(
        self, request: table_pb2.WriteClassCountsRequest, context: Context
    ) -> table_pb2.WriteClassCountsResponse:
        owner = self.handlers.catalog.owner(request.table)
        learned = wire.to_counts(request.learned, "learned") if request.HasField("learned") else None
        counts = wire.optional_tensor(request, "counts")
        if counts is None and learned is None:
            counts = wire.to_tensor(request.counts, "counts")  # raises, since neither is given
        if counts is not None:
            validate.class_counts(request.first_class, counts, owner.spec, self.handlers.limits)
        if learned is not None:
            validate.learned_counts(request.first_class, learned, owner.spec)
            owner.counts.write_learned(request.first_class, learned.numpy())
        if counts is not None:
            owner.counts.write(request.first_class, counts.double().numpy())
        return table_pb2.WriteClassCountsResponse()

    @answers
    def ReadClassCounts(
        self, request: table_pb2.ReadClassCountsRequest, context: Context
    ) -> table_pb2.ReadClassCountsResponse:
        owner = self.handlers.catalog.owner(request.table)
        validate.class_range(request.first_class, request.num_classes, owner.spec)
        if 16 * request.num_classes > self.handlers.limits.max_message_bytes:
            raise LimitExceeded(
                f"{request.num_classes} counts do not fit in one message; request fewer", field="num_classes"
            )
        counts = owner.read_counts(request.first_class, request.num_classes, self.handlers.deadline(context, request))
        return table_pb2.ReadClassCountsResponse(
            counts=None if counts.written is None else wire.from_tensor(torch.from_numpy(counts.written)),
            learned=None if counts.learned is None else wire.from_tensor(torch.from_numpy(counts.learned)),
            version=counts.version,
        )


class EvaluationServicer(evaluation_pb2_grpc.EvaluationServiceServicer):
    """The servicer of EvaluationService."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @answers
    def Evaluate(self, request: evaluation_pb2.EvaluateRequest, context: Context) -> evaluation_pb2.EvaluateResponse:
        ask, labels = self._ask(request, context), wire.to_ids(request.labels, "labels")
        if labels.dim() != 1:
            raise InvalidArgument(f"labels has shape {list(labels.shape)}; [N] is needed", field="labels")
        evaluation = self.handlers.evaluator.evaluate(
            ask,
            labels,
            ignore=request.ignore_index if request.HasField("ignore_index") else None,
            want_rank=request.want_rank,
            want_sigmoid=request.want_sigmoid,
        )
        return wire.evaluate_response(evaluation)

    @answers
    def TopK(self, request: evaluation_pb2.TopKRequest, context: Context) -> evaluation_pb2.TopKResponse:
        ask = self._ask(request, context)
        return wire.top_k_response(self.handlers.evaluator.top_k(ask, request.k, request.want_log_probs))

    @answers
    def Score(self, request: evaluation_pb2.ScoreRequest, context: Context) -> evaluation_pb2.ScoreResponse:
        ask, class_ids = self._ask(request, context), wire.to_ids(request.class_ids, "class_ids")
        return wire.score_response(self.handlers.evaluator.score(ask, class_ids, request.want_log_probs))

    @answers
    def SampleClasses(
        self, request: evaluation_pb2.SampleClassesRequest, context: Context
    ) -> evaluation_pb2.SampleClassesResponse:
        ask = self._ask(request, context)
        samples = self.handlers.evaluator.sample(ask, wire.draws(request), request.want_log_probs)
        return wire.sample_classes_response(samples)

    def _ask(self, request: Question, context: Context) -> Ask:
        """Decode the fields that all evaluation requests share."""
        hidden = wire.to_tensor(request.hidden, "hidden")
        return Ask(
            request.table, hidden, wire.logit_transform(request.logits), self.handlers.deadline(context, request)
        )


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """The servicer of ServerService."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    @answers
    def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Context) -> server_pb2.ServerInfo:
        group = self.handlers.catalog.group
        return server_pb2.ServerInfo(
            version=__version__,
            limits=server_pb2.ServerLimits(**asdict(self.handlers.limits)),
            features=FEATURES,
            num_workers=group.num_workers,
            devices=group.devices,
        )
