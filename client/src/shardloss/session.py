"""The steps of one trainer on one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from shardloss import messages, types
from shardloss.errors import RequestError, ShardlossError, StepReused, StepTooOld
from shardloss.messages import Numbers, numbers
from shardloss.v1 import loss_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.table import Table


class Session:
    """The steps of one trainer on one table. Steps begin at 1 and only grow; not thread-safe."""

    def __init__(self, table: Table, name: str, opened_at_version: int) -> None:
        self.table, self.name, self.opened_at_version = table, name, opened_at_version
        self.step = 1
        self.num_parts = 0
        self.follows: int | None = None  # a step whose commit may be under way

    def compute_loss(
        self,
        hidden: Numbers,
        labels: Array,
        loss: types.Loss,
        *,
        label_weights: Numbers | None = None,
        ignore_index: int | None = None,
        want_lse: bool = False,
        want_hidden_grad: bool = True,
        want_scale_grad: bool = False,
        grad_dtype: str | None = None,
        want_cost: bool = False,
    ) -> types.LossResult:
        """Score the next part of the present step, as `Table.compute_loss`, and leave its ticket open for `commit`.

        Raises:
            StepTooOld: the server has done this step already; the next call is a new step.
            RequestError, TransientError: as `Table.compute_loss`; the part is lost, the step goes on.
        """
        request = messages.loss_request(
            self.table.name,
            hidden,
            labels,
            loss,
            label_weights=label_weights,
            ignore_index=ignore_index,
            want_lse=want_lse,
            want_hidden_grad=want_hidden_grad,
            want_scale_grad=want_scale_grad,
            grad_dtype=grad_dtype,
            want_cost=want_cost,
        )
        self._key(request.message)
        self.num_parts += 1
        with self._passing(StepTooOld):
            return self.table.send_loss(request)

    def commit(
        self,
        parts: Sequence[tuple[types.LossResult | str, Array | None]],
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
        max_staleness: int | None = None,
        want_cost: bool = False,
    ) -> types.CommitResult:
        """One optimizer step over (result or ticket, g [N] or None for ones) of the present step, exactly once.

        All parts together fit one message (about a million rows of float32 in 4 MiB). learning_rate >= 0; grad_scale
        multiplies every g; want_cost asks what the call cost the server.

        Raises:
            TransientError: the same commit may be repeated; it is applied once.
            StepTooOld, StepReused: the server has done this step already; the next call is a new step.
            TicketUnknown, TicketExpired, TicketAborted, Stale, InvalidArgument: nothing was changed.
        """
        request = self._commit_request(parts, learning_rate, grad_scale, max_staleness)
        request.want_cost = want_cost
        with self._passing(StepTooOld, StepReused):
            result = self._send_commit(request)
        self._next_step()
        return result

    def begin_commit(
        self, parts: Sequence[tuple[str, Array]], *, learning_rate: float, grad_scale: float
    ) -> Callable[[], types.CommitResult]:
        """What sends the commit of the present step, once or again after a TransientError, from any thread.

        The session is at its next step from now on. Its losses follow this one while `follows` says so: the server
        scores them behind it, though its reply has not come.
        """
        request = self._commit_request(parts, learning_rate, grad_scale, None)
        self._next_step()
        self.follows = request.step

        def send() -> types.CommitResult:
            try:
                return self._send_commit(request)
            except RequestError:
                with suppress(ShardlossError):  # so that a loss which waits for the step is told
                    self._send_abort(request.step)
                raise

        return send

    def _commit_request(
        self,
        parts: Sequence[tuple[types.LossResult | str, Array | None]],
        learning_rate: float,
        grad_scale: float,
        max_staleness: int | None,
    ) -> loss_pb2.CommitRequest:
        with messages.writing_request():
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
                message.g.CopyFrom(numbers(g, f"parts[{len(request.parts) - 1}].g"))
        return request

    def _send_commit(self, request: loss_pb2.CommitRequest) -> types.CommitResult:
        client = self.table.client
        return messages.commit_result(client.channel.unary(client.losses.Commit, request, None))

    def train_step(
        self,
        hidden: Numbers,
        labels: Array | None,
        loss: types.Loss,
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
        upstream: Numbers | None = None,
        label_distribution: Array | None = None,
        label_weights: Array | None = None,
        ignore_index: int | None = None,
        want_hidden_grad: bool = True,
        grad_dtype: str | None = None,
        want_cost: bool = False,
    ) -> types.LossResult:
        """Score hidden [N, D] and commit in one call: the table's objective is grad_scale * sum(upstream [N] * loss),
        None is ones.

        label_distribution as in `Table.compute_loss`. The reply's tensors are None where an earlier try had committed
        and the server keeps its reply no more.

        Raises:
            TransientError: the same call may be repeated; it is applied once.
            SessionExpired: the server has forgotten the session; start a new one.
            RequestError: as `Table.compute_loss` and `commit`; nothing was changed.
        """
        request = messages.loss_request(
            self.table.name,
            hidden,
            labels,
            loss,
            label_weights=label_weights,
            ignore_index=ignore_index,
            upstream=upstream,
            want_hidden_grad=want_hidden_grad,
            grad_dtype=grad_dtype,
            want_cost=want_cost,
        )
        self._key(request.message)
        with messages.writing_request():
            now = request.message.commit_now
            now.learning_rate, now.grad_scale = learning_rate, grad_scale
        now.opened_at_version = self.opened_at_version
        with self._passing(StepTooOld, StepReused):
            result = self.table.send_loss(request, label_distribution)
        self._next_step()
        return result

    def skip(self) -> None:
        """Leave the present step to the next commit, which gives up what is below its own."""
        if self.num_parts:
            self._next_step()

    def abort(self) -> int:
        """Give up the present step's tickets, as if its losses had never been computed; the number given up."""
        if self.num_parts == 0:
            return 0
        try:
            return self._send_abort(self.step)
        finally:
            self._next_step()  # whatever became of it: the next commit gives up what is below its step

    def _send_abort(self, step: int) -> int:
        client = self.table.client
        request = loss_pb2.AbortRequest(table=self.table.name, session=self.name, step=step)
        reply: loss_pb2.AbortResponse = client.channel.unary(client.losses.Abort, request, None)
        return reply.num_aborted

    @contextmanager
    def _passing(self, *errors: type[ShardlossError]) -> Iterator[None]:
        """The errors say that the server has done this step: they are raised, and the next call is a new step.

        So it is after a commit whose replies were all lost, if the caller goes on instead of repeating it.
        """
        try:
            yield
        except errors:
            self._next_step()
            raise

    def _key(self, message: loss_pb2.ComputeLossRequest) -> None:
        message.session, message.step, message.part = self.name, self.step, self.num_parts
        if self.follows is not None:
            message.after_step = self.follows

    def _next_step(self) -> None:
        self.step += 1
        self.num_parts = 0
