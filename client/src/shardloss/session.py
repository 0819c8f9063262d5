"""The steps of one trainer on one table."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from shardloss import messages, types
from shardloss.errors import NotSupported, RequestError, ShardlossError, StepReused, StepTooOld
from shardloss.messages import Numbers, numbers
from shardloss.v1 import loss_pb2
from shardloss.wire import Array

if TYPE_CHECKING:
    from shardloss.table import Table


def log_name(session: str) -> str:
    """Return the name of a session in the server's log: a digest, because the name itself would allow commits."""
    return hashlib.blake2b(session.encode("utf-8", "replace"), digest_size=6).hexdigest()


class Session:
    """The steps of one trainer on one table. Step numbers start at 1 and only increase.

    One thread at a time may use a session: a call during another thread's call, or a loss during a step with losses of
    another thread that is still alive, is refused with NotSupported and changes nothing.
    """

    def __init__(self, table: Table, name: str, opened_at_version: int) -> None:
        self.table, self.name, self.opened_at_version = table, name, opened_at_version
        self.step = 1
        self.num_parts = 0
        self._scoring_s = 0.0  # seconds that the losses of this step took
        self.follows: int | None = None  # a step whose commit may be in progress
        self._entering = threading.Lock()
        self._inside: threading.Thread | None = None  # the thread whose call is in progress
        self._scorer: threading.Thread | None = None  # the thread that computed the losses of the current step

    def __repr__(self) -> str:
        where = f"table {self.table.name!r} on {self.table.client.address}"
        return (
            f"<Session {log_name(self.name)} of {where}, step {self.step}, opened at version {self.opened_at_version}>"
        )

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
        """Score the next part of the current step, like `Table.compute_loss`, and leave its ticket open for `commit`.

        Raises:
            StepTooOld: the server has already finished this step; the next call starts a new step.
            RequestError, TransientError: as in `Table.compute_loss`; the part is lost but the step continues.
        """
        request = messages.loss_request(
            self.table.reference,
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
        with self.used(opens=True):
            self._key(request.message)
            self.num_parts += 1
            began = time.monotonic()
            try:
                with self._passing(StepTooOld):
                    return self.table._send_loss(request)
            finally:
                self._scoring_s += time.monotonic() - began

    def commit(
        self,
        parts: Sequence[tuple[types.LossResult | str, Array | None]],
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
        max_staleness: int | None = None,
        want_cost: bool = False,
    ) -> types.CommitResult:
        """Commit parts of the current step, each (result or ticket, g [N] or None for ones), as one optimizer step.

        The step is applied exactly once. All parts together must fit in one message (about a million rows of float32 in
        4 MiB). The call may take twice the time of the step's losses longer than the client's timeout_s. learning_rate
        is >= 0; grad_scale multiplies every g; want_cost requests the cost of the call.

        Raises:
            TransientError: the same commit may be repeated; it is applied once.
            StepTooOld, StepReused: the server has already finished this step; the next call starts a new step.
            TicketUnknown, TicketExpired, TicketAborted, Stale, InvalidArgument: nothing was changed.
        """
        with self.used():
            request = self._commit_request(parts, learning_rate, grad_scale, max_staleness)
            request.want_cost = want_cost
            with self._passing(StepTooOld, StepReused):
                result = self._send_commit(request, self._commit_timeout_s)
            self._next_step()
            return result

    def _begin_commit(
        self, parts: Sequence[tuple[str, Array]], *, learning_rate: float, grad_scale: float
    ) -> Callable[[], types.CommitResult]:
        """Return a function that sends the commit of the current step, from any thread.

        The function can be called again after a TransientError. The session moves on to its next step immediately.
        While `follows` is set, the server scores the session's losses after this commit, even before its reply arrives.
        """
        request, timeout_s = self._commit_request(parts, learning_rate, grad_scale, None), self._commit_timeout_s
        self._next_step()
        self.follows = request.step

        def send() -> types.CommitResult:
            try:
                return self._send_commit(request, timeout_s)
            except RequestError:
                with suppress(ShardlossError):  # so that a loss that waits for the step is refused
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
                table=self.table.reference,
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

    @property
    def _commit_timeout_s(self) -> float:
        """A commit may have to compute all losses of the step again, and their gradients."""
        return self.table.client.channel.timeout_s + 2.0 * self._scoring_s

    def _send_commit(self, request: loss_pb2.CommitRequest, timeout_s: float) -> types.CommitResult:
        client = self.table.client
        return messages.commit_result(client.channel.unary(client.losses.Commit, request, timeout_s))

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
        """Score hidden [N, D] and commit in one call; the objective is grad_scale * sum(upstream [N] * loss).

        upstream None is ones; label_distribution is as in `Table.compute_loss`. The tensors of the result are None if
        an earlier try has committed and the server no longer keeps its reply.

        Raises:
            TransientError: the same call may be repeated; it is applied once.
            SessionExpired: the server has forgotten the session; start a new one.
            RequestError: as in `Table.compute_loss` and `commit`; nothing was changed.
        """
        request = messages.loss_request(
            self.table.reference,
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
        with messages.writing_request():
            now = request.message.commit_now
            now.learning_rate, now.grad_scale = learning_rate, grad_scale
        now.opened_at_version = self.opened_at_version
        with self.used(opens=True):
            self._key(request.message)
            with self._passing(StepTooOld, StepReused):
                result = self.table._send_loss(request, label_distribution)
            self._next_step()
            return result

    def _skip(self) -> None:
        """Leave the current step, if it has parts, without an abort; the next commit gives up all earlier steps."""
        if self.num_parts:
            self._next_step()

    def abort(self) -> int:
        """Give up the tickets of the current step, as if its losses had never been computed; return their number."""
        with self.used():
            if self.num_parts == 0:
                return 0
            try:
                return self._send_abort(self.step)
            finally:
                self._next_step()  # even if the abort failed: the next commit gives up all earlier steps

    def _send_abort(self, step: int) -> int:
        client = self.table.client
        request = loss_pb2.AbortRequest(table=self.table.reference, session=self.name, step=step)
        reply: loss_pb2.AbortResponse = client.channel.unary(client.losses.Abort, request, None)
        return reply.num_aborted

    @contextmanager
    def used(self, *, opens: bool = False) -> Iterator[None]:
        """Keep other threads out during a call of this thread; opens: also of the step that the call opens or joins.

        Raises:
            NotSupported: another thread is inside a call or, if opens, has computed losses of the current step.
        """
        me = threading.current_thread()
        with self._entering:
            outer = self._inside
            for other in (outer, self._scorer if opens and self.num_parts else None):
                if other is not None and other is not me and other.is_alive():
                    raise NotSupported(
                        f"threads {other.name!r} and {me.name!r} use one session of table {self.table.name!r} at the "
                        "same time: give each thread a session (table.session()) or a head (copy.deepcopy(head)) with "
                        "an optimizer of its own; losses that train nothing belong under torch.no_grad()"
                    )
            self._inside = me
            if opens:
                self._scorer = me
        try:
            yield
        finally:
            self._inside = outer

    @contextmanager
    def _passing(self, *errors: type[ShardlossError]) -> Iterator[None]:
        """Move on to the next step and re-raise if one of errors is raised: the server has already finished this step.

        This happens after a commit whose replies were all lost, if the caller continues instead of repeating it.
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
        self.num_parts, self._scoring_s = 0, 0.0
