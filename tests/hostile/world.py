"""A small server with low limits, and one table in the middle of training that no refused request may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
import numpy as np
import shardloss
from google.protobuf.message import Message
from shardloss import wire
from shardloss.channel import error_of
from shardloss.v1 import evaluation_pb2, loss_pb2, table_pb2
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import Limits, ServerConfig
from shardloss_server.rpc.serve import Server

V, D, N, T, S = 11, 5, 7, 2, 6
MAX_BATCH, MAX_TRUE, MAX_SAMPLED, MAX_PARTS, MAX_TOP_K, MAX_REPLY_BYTES = 64, 7, 50, 5, 6, 1200
LIMITS = dataclasses.replace(
    Limits(),
    max_batch=MAX_BATCH,
    max_num_true=MAX_TRUE,
    max_num_sampled=MAX_SAMPLED,
    max_dim=16,
    max_num_classes=1000,
    max_num_shards=9,
    max_table_bytes=30_000,
    max_tables=5,
    max_parts=MAX_PARTS,
    max_top_k=MAX_TOP_K,
    max_reply_bytes=MAX_REPLY_BYTES,
    max_deadline_s=20.0,
)
TRY_S = 120.0

R = TypeVar("R")


@contextmanager
def serving(limits: Limits, num_workers: int = 2) -> Iterator[Server]:
    """Run a server over worker threads, on free ports."""
    group = LocalGroup(num_workers)
    server = Server(group, ServerConfig(limits=limits))
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=1.0)
        group.close()


def once(method: Callable[..., R], request: object, timeout_s: float = TRY_S) -> R:
    """Call a method once without retries; a failure raises the error that a client would see."""
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as failure:
        raise error_of(failure) from None


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Return small, distinct, finite floats, the same in every test."""
    return (np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape) % 17 - 8) / 7


class World:
    """A float32 table at version 3 whose session "open" has committed step 2 and holds a ticket of step 3.

    Session "done" has aborted step 1.
    """

    def __init__(self, server: Server, client: shardloss.LossClient, name: str) -> None:
        self.server, self.client, self.name = server, client, name
        self.is_proven = False
        start = shardloss.Normal(0.5, seed=4)
        self.table = client.create_table(name, num_classes=V, dim=D, num_shards=3, placement="mod", initializer=start)
        self.table.write_rows(np.arange(2), numbers(2, D), numbers(2))
        opened, done = (RawSession(self, session) for session in ("open", "done"))
        for step in (1, 2):
            once(client.losses.Commit, self.commit("open", step, [opened.loss(step).ticket]))
        self.ticket = opened.loss(3).ticket
        done.loss(1)
        once(client.losses.Abort, loss_pb2.AbortRequest(table=name, session="done", step=1))
        self.state = self.look()
        self.answer = self.good_call()

    def close(self) -> None:
        """Delete the world's tables."""
        for info in self.client.list_tables():
            if info.name.startswith(self.name):
                self.client.delete_table(info.name)

    # Valid requests, which the tests corrupt

    def full(self) -> loss_pb2.ComputeLossRequest:
        """Return a full softmax request of a valid batch, without a session."""
        return loss_pb2.ComputeLossRequest(
            table=self.name,
            hidden=wire.encode(numbers(N, D)),
            labels=wire.encode(np.arange(N * T).reshape(N, T) % V),
            full_softmax=loss_pb2.FullSoftmax(),
            want_lse=True,
        )

    def keyed(self) -> loss_pb2.ComputeLossRequest:
        """Return the same request as `full`, in step 1 of the session "fresh"."""
        request = self.full()
        request.session, request.step = "fresh", 1
        return request

    def one_call(self) -> loss_pb2.ComputeLossRequest:
        """Return the one-call form of a step: loss, upstream gradient and commit."""
        request = self.keyed()
        request.upstream.CopyFrom(wire.encode(numbers(N)))
        request.commit_now.learning_rate = 0.1
        return request

    def drawn(self) -> loss_pb2.ComputeLossRequest:
        """Return a sampled softmax request whose candidates the server draws."""
        request = self.full()
        request.sampled_softmax.sampler.kind = loss_pb2.Sampler.KIND_UNIFORM
        request.sampled_softmax.sampler.num_sampled = S
        return request

    def values(self) -> loss_pb2.ComputeLossRequest:
        """Return a sampled softmax request with the caller's own candidates."""
        request = self.full()
        values = request.sampled_softmax.sampled_values
        values.sampled.CopyFrom(wire.encode(np.array([1, 4, 4, 9, 0, 10])))
        values.true_expected_count.CopyFrom(wire.encode(np.full((N, T), 0.3)))
        values.sampled_expected_count.CopyFrom(wire.encode(np.full(S, 0.7)))
        return request

    def commit(self, session: str = "open", step: int = 3, tickets: list[str] | None = None) -> loss_pb2.CommitRequest:
        """Return a commit; by default, of the open ticket."""
        request = loss_pb2.CommitRequest(table=self.name, session=session, step=step, learning_rate=0.1)
        for ticket in [self.ticket] if tickets is None else tickets:
            request.parts.add(ticket=ticket, g=wire.encode(numbers(N)))
        return request

    def abort(self) -> loss_pb2.AbortRequest:
        return loss_pb2.AbortRequest(table=self.name, session="open", step=3)

    def sample(self) -> loss_pb2.SampleCandidatesRequest:
        request = loss_pb2.SampleCandidatesRequest(table=self.name, step=1, labels=wire.encode(np.zeros((N, T), int)))
        request.sampler.kind, request.sampler.num_sampled = loss_pb2.Sampler.KIND_LOG_UNIFORM, S
        return request

    def create(self) -> table_pb2.CreateTableRequest:
        """Return a request to create a small table with a new name."""
        spec = table_pb2.TableSpec(name=f"{self.name}-new", num_classes=V, dim=D, num_shards=3)
        return table_pb2.CreateTableRequest(spec=spec)

    def again(self) -> table_pb2.CreateTableRequest:
        """Return a request to create the world's table again with its present spec."""
        return table_pb2.CreateTableRequest(
            spec=once(self.client.tables.GetTable, table_pb2.GetTableRequest(table=self.name)).spec
        )

    def get(self) -> table_pb2.GetTableRequest:
        return table_pb2.GetTableRequest(table=self.name)

    def delete(self) -> table_pb2.DeleteTableRequest:
        return table_pb2.DeleteTableRequest(table=self.name)

    def rename(self) -> table_pb2.RenameTableRequest:
        return table_pb2.RenameTableRequest(table=self.name, new_name="new-name")

    def read(self) -> table_pb2.ReadRowsRequest:
        return table_pb2.ReadRowsRequest(table=self.name, class_ids=wire.encode(np.array([3, 0, 3])), want_state=True)

    def read_counts(self) -> table_pb2.ReadClassCountsRequest:
        return table_pb2.ReadClassCountsRequest(table=self.name, first_class=2, num_classes=3)

    def write(self) -> table_pb2.WriteRowsRequest:
        return table_pb2.WriteRowsRequest(
            table=self.name,
            class_ids=wire.encode(np.array([3, 0, 7])),
            rows=wire.encode(numbers(3, D)),
            biases=wire.encode(numbers(3)),
        )

    def evaluate(self) -> evaluation_pb2.EvaluateRequest:
        return evaluation_pb2.EvaluateRequest(
            table=self.name, hidden=wire.encode(numbers(N, D)), labels=wire.encode(np.arange(N)), want_rank=True
        )

    def top_k(self) -> evaluation_pb2.TopKRequest:
        return evaluation_pb2.TopKRequest(table=self.name, hidden=wire.encode(numbers(N, D)), k=3, want_log_probs=True)

    def score(self) -> evaluation_pb2.ScoreRequest:
        return evaluation_pb2.ScoreRequest(
            table=self.name, hidden=wire.encode(numbers(N, D)), class_ids=wire.encode(np.array([0, 10, 3]))
        )

    def sample_classes(self) -> evaluation_pb2.SampleClassesRequest:
        return evaluation_pb2.SampleClassesRequest(
            table=self.name, hidden=wire.encode(numbers(N, D)), num_samples=4, seed=3, want_log_probs=True
        )

    # State that must not change

    def method(self, request: Message) -> Callable[..., Message]:
        """Return the stub's method for this request."""
        name = type(request).__name__.removesuffix("Request")
        stubs = (self.client.losses, self.client.tables, self.client.questions)
        return next(getattr(stub, name) for stub in stubs if hasattr(stub, name))

    def look(self) -> tuple[object, ...]:
        """Return the info of every table, and the version and all bits of the rows and biases of this one."""
        rows = self.table.read_rows(np.arange(V))
        assert rows.biases is not None
        return tuple(self.client.list_tables()), rows.version, rows.rows.tobytes(), rows.biases.tobytes()

    def good_call(self) -> bytes:
        """Return the bits of the loss of a valid request."""
        return once(self.client.losses.ComputeLoss, self.full()).loss.SerializeToString()

    def assert_untouched(self) -> None:
        """Assert that rows, version and tickets are unchanged and a valid request gets the same loss as before."""
        assert self.look() == self.state
        assert self.good_call() == self.answer
        assert RawSession(self, "open").loss(3).replayed
        assert self.server.handlers.admission.num_calls == 0
        self.is_proven = True


class RawSession:
    """The losses of one session of a world, sent without retries."""

    def __init__(self, world: World, session: str) -> None:
        self.world, self.session = world, session

    def loss(self, step: int) -> loss_pb2.ComputeLossResponse:
        request = self.world.full()
        request.session, request.step = self.session, step
        return once(self.world.client.losses.ComputeLoss, request)
