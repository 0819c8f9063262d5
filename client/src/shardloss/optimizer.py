"""The torch optimizer of a remote table."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from shardloss import types
from shardloss.errors import (
    InvalidArgument,
    NotSupported,
    RequestError,
    ShardlossError,
    StepTooOld,
    TableNotFound,
    TransientError,
)
from shardloss.session import Session

MAX_DEAD_PARTS = 16  # if more losses of one step were freed, its others are considered abandoned too
MANY_PARTS = 16  # above this number of losses in one step, a warning asks whether step() was forgotten
MAX_UNOWNED_PARTS = 8  # losses that stay open for an optimizer that may still be created

NO_OPTIMIZER = "there was no optimizer to commit the losses"

Alone = Callable[..., object]
F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Exclude a function from torch.compile, which cannot trace an RPC; it runs between the compiled graphs."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Part:
    """One loss of a step, alive as long as the graph of that loss, because its backward may still record the part.

    A loss without a ticket is a step of its own: `alone` is called with its g [N], the learning rate, the grad scale
    and the tensors to send. These are `sent` while they are recorded, and saved tensors of the graph before.
    """

    __slots__ = ("__weakref__", "alone", "sent", "ticket")

    def __init__(self, ticket: str, alone: Alone | None = None) -> None:
        self.ticket, self.alone = ticket, alone
        self.sent: tuple[Tensor, ...] = ()


class Pending:
    """The gradients g [N] that backward has recorded for the next commit, which is one step of one session.

    The gradient of the scalar probe is the factor by which the commit multiplies g: 1 after backward, 1/scale after a
    GradScaler has unscaled it, and not finite if g is not. The table is frozen while the probe requires no gradient.
    """

    def __init__(self, session: Session, learning_rate: float | None, advice: str) -> None:
        self.session, self.learning_rate, self._advice = session, learning_rate, advice
        self.has_optimizer = learning_rate is not None
        self.untrained: str | None = None  # why losses since the last step did not train the table
        self._num_dropped = 0  # calls of zero_grad since the last commit that dropped gradients
        self._is_unowned = False  # an optimizer was not created in time, so losses open no tickets
        self._warned: set[str] = set()
        self.probe = torch.zeros((), device="cpu", requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._on_accumulated)  # type: ignore[no-untyped-call]
        self._waiting: WeakSet[Part] = WeakSet()
        self._upstreams: dict[Part, Tensor] = {}
        self._has_accumulated = False
        self._retired: str | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[object] | None = None
        self._send: Callable[[], object] | None = None  # sends the commit in progress; kept while it may be repeated

    def retire(self, reason: str) -> None:
        """Mark this object as replaced: it records nothing more, and the optimizer's next step() raises an error."""
        self._retired = reason

    def check_in_use(self) -> None:
        """Raise `TableNotFound` if this object was retired, because nothing is recorded in it any more.

        Raises:
            TableNotFound: this object was retired; the message gives the reason.
        """
        if self._retired is not None:
            raise TableNotFound(f"{self._retired}: create a new optimizer for it")

    def warn_once(self, message: str) -> None:
        """Warn about the table, at the caller's own line, with a message that was not given before."""
        if message in self._warned:
            return
        self._warned.add(message)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
            "shardloss",
            "torch",
        ):
            level, frame = level + 1, frame.f_back
        warnings.warn(f"table {self.session.table.name!r}: {message}", stacklevel=level)

    def opens_part(self) -> bool:
        """Return True if the next loss can still be committed.

        It cannot if the table is frozen. Without an optimizer, which may be created after a loss, a few losses stay
        open; then all are given up, and later ones open no ticket until an optimizer is created.
        """
        if self.has_optimizer or not self.probe.requires_grad:
            return self.probe.requires_grad
        if not self._is_unowned and self._num_held >= MAX_UNOWNED_PARTS:
            self._is_unowned = True
            self._give_up()
            self.warn_once(
                f"{MAX_UNOWNED_PARTS} losses were computed for training, but no optimizer can commit them, so they do "
                f"not train the table: {self._advice}"
            )
        self.untrained = NO_OPTIMIZER if self._is_unowned else self.untrained
        return not self._is_unowned

    @property
    def _num_held(self) -> int:
        """Number of losses of this step that were recorded or may still be."""
        return len(self._waiting) + len(self._upstreams)

    def compute_loss(self, *args: Any, **options: Any) -> types.LossResult:
        """Compute the next part of the current step with `Session.compute_loss`.

        If all losses of the step, or more than MAX_DEAD_PARTS, were freed without a backward, as in a validation loop
        without no_grad, the step is given up first. If the server has already finished the step, for example after a
        commit whose replies were lost, recorded gradients are dropped and the loss belongs to the next step.
        """
        with self.session.used(opens=True):
            if self._under_way is None or self._under_way.done():
                self.join()
            if not self._upstreams:
                self._leave_if_nobody_waits()
                if self.session.num_parts - len(self._waiting) > MAX_DEAD_PARTS:
                    self._give_up()
            try:
                return self.session.compute_loss(*args, **options)
            except ShardlossError as error:
                self.join()  # if the previous step failed, its error is raised first
                if not isinstance(error, StepTooOld):
                    raise
            self._clear()
            return self.session.compute_loss(*args, **options)

    def part(self, ticket: str, alone: Alone | None = None) -> Part:
        """Return a new part for a ticket or for a step of its own; the graph of its loss keeps it alive."""
        part = Part(ticket, alone)
        self._waiting.add(part)
        if self._num_held > MANY_PARTS:
            self.warn_once(
                f"more than {MANY_PARTS} losses wait for one commit, and the server keeps their rows: call step() "
                "of the table's optimizer after backward, and compute losses that do not train under torch.no_grad(); "
                "ignore this if your steps accumulate that many"
            )
        return part

    def record(self, part: Part, g: Tensor, sent: tuple[Tensor, ...] = ()) -> float:
        """Add g [N] to a part and return the gradient of the probe: 1 for the first part of a step, then 0.

        sent are the tensors that a part without a ticket sends again with its commit.

        If g is not finite, the returned gradient is nan, so that a GradScaler skips the step. A head with its own
        learning rate commits here. If the probe's gradient has been cleared, earlier records are dropped, as the
        gradient of a local parameter would be.

        Raises:
            InvalidArgument: the head has its own learning rate, and g is not finite or another loss of the step still
                waits for its backward; the step is given up.
        """
        if self._has_accumulated and self.probe.grad is None:
            self._forget_recorded()
        is_first = not self._upstreams
        known = self._upstreams.get(part)
        self._upstreams[part], part.sent = g.clone() if known is None else known + g, sent
        self._waiting.discard(part)
        is_finite = bool(torch.isfinite(g).all())
        if self.learning_rate is None:
            return float(is_first) if is_finite else float("nan")
        if not is_finite or self._waiting:
            what = "two losses in one step" if is_finite else "a gradient that is not finite"
            self._give_up()
            raise InvalidArgument(f"a head with its own learning rate got {what}; the table's step was given up")
        self.commit(self.learning_rate, 1.0)
        return float(is_first)

    def commit(self, learning_rate: float, grad_scale: float, overlap: bool = False) -> None:
        """Commit the recorded gradients as one step; do nothing if there are none.

        Losses of the step whose backward has not run are given up. After a TransientError the recorded parts are kept,
        so a second call repeats the same commit. A head with its own learning rate cannot repeat a commit and gives the
        step up instead; the step is also given up if the commit is refused.

        With overlap, the commit is still in progress when this returns. The server scores the next loss after the
        commit. If the commit fails, the next loss, commit or `join` raises its error.
        """
        with self.session.used():
            self.join()
            if not self._upstreams:
                return
            self._num_dropped = 0
            if overlap and all(part.alone is None for part in self._upstreams):
                self._begin_commit(learning_rate, grad_scale)
                return
            try:
                self._commit_recorded(learning_rate, grad_scale)
            except ShardlossError as error:
                if isinstance(error, RequestError) or self.learning_rate is not None:
                    self._give_up()
                raise
            self._clear()

    def join(self) -> None:
        """Wait for the commit in progress, if there is one; a commit that got no reply is sent again first.

        Raises:
            TransientError: there was again no reply; the next call repeats the commit.
            RequestError, ServiceError: the step was refused.
        """
        send = self._send
        if send is None:
            return
        try:
            send() if self._under_way is None else self._under_way.result()
        except TransientError:
            self._under_way = None  # it is sent again next time
            raise
        except ShardlossError:
            self._forget_commit(send)
            raise
        self._forget_commit(send)

    def _forget_commit(self, send: Callable[[], object]) -> None:
        """Forget the commit in progress, whose outcome is known, unless another thread has begun the next one."""
        if self._send is send:
            self._send = self._under_way = self.session.follows = None

    def _begin_commit(self, learning_rate: float, grad_scale: float) -> None:
        tickets = [(part.ticket, wire_array(g)) for part, g in self._upstreams.items()]
        self._send = self.session._begin_commit(tickets, learning_rate=learning_rate, grad_scale=grad_scale)
        self._clear()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "shardloss-commit")
        self._under_way = self._thread.submit(copy_context().run, self._send)  # in the caller's trace context
        self.session.table.client._watch(self._under_way)

    def _commit_recorded(self, learning_rate: float, grad_scale: float) -> None:
        parts = [(part, wire_array(g)) for part, g in self._upstreams.items()]
        alone = [(part.alone, part.sent, g) for part, g in parts if part.alone is not None]
        if alone and len(parts) > 1:
            raise InvalidArgument("a loss of a label distribution needs a step of its own; this step has others")
        for step, sent, g in alone:
            step(g, learning_rate, grad_scale, *sent)
        if not alone:
            tickets = [(part.ticket, g) for part, g in parts]
            self.session.commit(tickets, learning_rate=learning_rate, grad_scale=grad_scale)

    def zero(self) -> None:
        """Drop the recorded gradients as `drop` does; warn if that has happened many times without a commit."""
        self._num_dropped += bool(self._upstreams)
        self.drop()
        if self._num_dropped > MANY_PARTS:
            self.warn_once(
                f"zero_grad() has dropped the gradients of more than {MANY_PARTS} steps in a row: call step() of the "
                "table's optimizer after backward, or freeze the table with requires_grad_(False) of its head"
            )

    def drop(self) -> None:
        """Drop the recorded gradients, and give the step up unless a loss still waits for its backward."""
        with self.session.used(opens=True):
            self._forget_recorded()
            self._leave_if_nobody_waits()

    def _leave_if_nobody_waits(self) -> None:
        if self.session.num_parts and not self._waiting:
            self._give_up()

    def _give_up(self) -> None:
        self._clear()
        if self._send is not None:  # an abort would give up the step in progress too; the next commit gives up this one
            self.session._skip()
            return
        with suppress(ShardlossError):  # a lost abort is harmless: the next commit gives up all earlier steps
            self.session.abort()

    def _clear(self) -> None:
        self._waiting.clear()
        self._forget_recorded()

    def _forget_recorded(self) -> None:
        for part in self._upstreams:
            part.sent = ()
        self._upstreams = {}
        self._has_accumulated = False
        self.probe.grad = None

    @uncompiled
    def _on_accumulated(self, _probe: Tensor) -> None:
        self._has_accumulated = True


def wire_array(g: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return g as a NumPy array: float64 is kept, other dtypes become float32."""
    return (g if g.dtype == torch.float64 else g.float()).numpy()


class RemoteOptimizer(torch.optim.Optimizer):
    """An optimizer whose step() commits the parts whose backward has run, at the learning rate of its one param group.

    Its only parameter is the head's probe, so schedulers and torch.amp.GradScaler treat it as any other optimizer. The
    rows are updated by the table's own optimizer, whose state is stored with the table; state_dict contains only lr.
    Leave the probe out of gradient clipping: its gradient is the scale of the step, not a norm. The optimizer cannot be
    copied or pickled, because a second one would commit the same step.

    With overlap, step() returns immediately, and the table applies the step while the trainer continues. The server
    scores the head's next loss after the step, so training is the same to the bit. If the commit fails, the next loss,
    step() or synchronize() raises its error; after a TransientError each of them first sends the same commit again.
    Other readers of the table see the step once it is applied, which synchronize() waits for.
    """

    def __init__(self, pending: Pending, lr: float, overlap: bool = False) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr = {lr} must be >= 0")
        self._pending, self._overlap = pending, overlap
        pending.has_optimizer = True
        super().__init__([pending.probe], {"lr": lr})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupported("a remote optimizer cannot be copied or pickled; create one with head.optimizer(lr)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise `NotSupported`, because a remote table has one param group.

        Raises:
            NotSupported: always, except while the optimizer is being created.
        """
        if self.param_groups:
            raise NotSupported("a remote optimizer updates only its table; use another one for other parameters")
        super().add_param_group(param_group)

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Commit the recorded gradients. With a closure, evaluate it first and return its loss.

        A step without gradients does nothing, as in torch, but warns once if losses were computed that a step was
        expected to commit: in eval mode, or before the head had an optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pending.check_in_use()
        self._pending.join()
        grad = self._pending.probe.grad
        untrained, self._pending.untrained = self._pending.untrained, None
        if grad is not None:
            self._pending.commit(float(self.param_groups[0]["lr"]), float(grad), self._overlap)
            return loss
        self._pending.drop()  # torch's optimizers also skip a parameter without a gradient
        if untrained is not None:
            self._pending.warn_once(f"step() did not train the table: {untrained}")
        return loss

    def synchronize(self) -> None:
        """Wait until the last step is applied.

        Raises:
            ShardlossError: the step failed; after a TransientError another call repeats the commit.
        """
        self._pending.join()

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  (torch's signature)
        """Drop recorded gradients that were not committed; losses whose backward has not run yet stay valid."""
        self._pending.zero()
