"""Single-try calls without the client's retries, so that a test decides which calls are repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc
import numpy as np
import shardloss
from shardloss import messages, wire
from shardloss.channel import error_of
from shardloss.types import CommitResult, LossResult
from shardloss.v1 import loss_pb2

from .oracle import Batch

TRY_S = 120.0

Q = TypeVar("Q")
R = TypeVar("R")


def once(method: Callable[..., R], request: object, timeout_s: float = TRY_S) -> R:
    """Try a call once; a failure raises the error that a client would see."""
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as failure:
        raise error_of(failure) from None


def loss_request(table: str, session: str, step: int, part: int, batch: Batch) -> loss_pb2.ComputeLossRequest:
    """Return the ComputeLoss request of a batch under a key, asking for the hidden gradient and the lse."""
    message = loss_pb2.ComputeLossRequest(
        table=table,
        session=session,
        step=step,
        part=part,
        hidden=wire.encode(batch.hidden),
        labels=wire.encode(batch.labels),
        want_hidden_grad=True,
        want_lse=True,
    )
    messages.set_loss(message, batch.loss)
    return message


def commit_request(
    table: str, session: str, step: int, parts: list[tuple[str, np.ndarray | None]], learning_rate: float
) -> loss_pb2.CommitRequest:
    """Return the Commit request of (ticket, g) parts under a key."""
    message = loss_pb2.CommitRequest(table=table, session=session, step=step, learning_rate=learning_rate)
    for ticket, g in parts:
        part = message.parts.add(ticket=ticket)
        if g is not None:
            part.g.CopyFrom(wire.encode(g))
    return message


class RawTrainer:
    """A session of a table whose calls are tried once."""

    def __init__(self, table: shardloss.Table, session: str) -> None:
        self.table, self.session = table, session
        self.losses = table.client.losses

    def loss(self, step: int, batch: Batch, part: int = 0) -> LossResult:
        """Call ComputeLoss under (step, part)."""
        request = loss_request(self.table.name, self.session, step, part, batch)
        return messages.loss_result(once(self.losses.ComputeLoss, request))

    def send(self, request: loss_pb2.CommitRequest, timeout_s: float = TRY_S) -> CommitResult:
        """Send a Commit request unchanged."""
        return messages.commit_result(once(self.losses.Commit, request, timeout_s))

    def request(self, step: int, parts: list[tuple[str, np.ndarray | None]], lr: float) -> loss_pb2.CommitRequest:
        """Return a Commit request of this session."""
        return commit_request(self.table.name, self.session, step, parts, lr)

    def scored(self, step: int, batch: Batch, lr: float) -> loss_pb2.CommitRequest:
        """Score a batch and return the Commit request that would apply it."""
        return self.request(step, [(self.loss(step, batch).ticket, batch.g)], lr)

    def one_call(self, step: int, batch: Batch, lr: float) -> loss_pb2.ComputeLossRequest:
        """Return the one-call form of a step: a ComputeLoss request that also commits."""
        request = loss_request(self.table.name, self.session, step, 0, batch)
        request.upstream.CopyFrom(wire.encode(batch.g))
        request.commit_now.learning_rate = lr
        return request
