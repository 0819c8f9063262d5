"""The optimizer of a remote table, as torch sees it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from shardloss import types, wire
from shardloss.errors import InvalidArgument, NotSupported, RequestError, ShardlossError, StepTooOld, TransientError
from shardloss.session import Session

MAX_DEAD_PARTS = 16  # losses of one step that were let go before the others are taken for forgotten, too


Alone = Callable[[wire.Array, float, float], object]


class Part:
    """One loss of a step. It lives as long as the graph of that loss, whose backward may still record it.

    A loss without a ticket is a step of its own: `alone` gets its g [N], the learning rate and the grad scale.
    """

    __slots__ = ("__weakref__", "alone", "ticket")

    def __init__(self, ticket: str, alone: Alone | None = None) -> None:
        self.ticket, self.alone = ticket, alone


class Pending:
    """What backward left for the next commit: g [N] by ticket. One step of one session.

    probe is the scalar whose gradient tells how far g is scaled: 1 after backward, 1/scale once a GradScaler has
    unscaled it, not finite where g is not.
    """

    def __init__(self, session: Session, learning_rate: float | None = None) -> None:
        self.session, self.learning_rate = session, learning_rate
        self.probe = torch.zeros((), device="cpu", requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._on_accumulated)  # type: ignore[no-untyped-call]
        self._waiting: WeakSet[Part] = WeakSet()
        self._upstreams: dict[Part, Tensor] = {}
        self._has_accumulated = False
        self._retired: str | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: Future[object] | None = None
        self._send: Callable[[], object] | None = None  # the commit under way; kept while it may have to be repeated

    def retire(self, reason: str) -> None:
        """Another one has taken its place: nothing can be recorded any more, and the optimizer says so."""
        self._retired = reason

    def check_in_use(self) -> None:
        """Refuse to step what nothing is recorded for.

        Raises:
            InvalidArgument: it was retired.
        """
        if self._retired is not None:
            raise InvalidArgument(f"{self._retired}: make a new optimizer of it")

    def compute_loss(self, *args: Any, **options: Any) -> types.LossResult:
        """`Session.compute_loss` of the next part of the present step.

        A step whose losses were let go without a backward, all of them or more than MAX_DEAD_PARTS, is given up first:
        so is a validation loop that forgot no_grad. Where the server has done the step,
        as after a commit whose replies were lost, what it held is forgotten and the loss belongs to the next one.
        """
        if self._under_way is None or self._under_way.done():
            self.join()
        if not self._upstreams:
            self._leave_if_nobody_waits()
            if self.session.num_parts - len(self._waiting) > MAX_DEAD_PARTS:
                self._give_up()
        try:
            return self.session.compute_loss(*args, **options)
        except ShardlossError as error:
            self.join()  # the step before may have failed, which is told first
            if not isinstance(error, StepTooOld):
                raise
        self._clear()
        return self.session.compute_loss(*args, **options)

    def part(self, ticket: str, alone: Alone | None = None) -> Part:
        """The part of a ticket, or a step of its own, for the graph of its loss to hold."""
        part = Part(ticket, alone)
        self._waiting.add(part)
        return part

    def record(self, part: Part, g: Tensor) -> float:
        """Add g [N] to a part and return the gradient of the probe: 1 for the first part of a step, then 0.

        Not finite g gives a not finite gradient, so that a GradScaler skips the step. With a learning rate of its own
        the head commits here. What was recorded before is forgotten where somebody has cleared the probe's gradient,
        as a local parameter's would be.

        Raises:
            InvalidArgument: the head commits by itself, and g is not finite or another loss waits for its backward in
                this step, which is given up.
        """
        if self._has_accumulated and self.probe.grad is None:
            self._forget_recorded()
        is_first = not self._upstreams
        known = self._upstreams.get(part)
        self._upstreams[part] = g.clone() if known is None else known + g
        self._waiting.discard(part)
        is_finite = bool(torch.isfinite(g).all())
        if self.learning_rate is None:
            return float(is_first) if is_finite else float("nan")
        if not is_finite or self._waiting:
            what = "two losses in one step" if is_finite else "a gradient that is not finite"
            self._give_up()
            raise InvalidArgument(f"a head with a learning rate of its own met {what}; the table's step was given up")
        self.commit(self.learning_rate, 1.0)
        return float(is_first)

    def commit(self, learning_rate: float, grad_scale: float, overlap: bool = False) -> None:
        """Commit what was recorded as one step; nothing recorded is no step.

        Losses of the step whose backward has not run are given up with it. After a TransientError the recorded parts
        stay, so a second call repeats the same commit; only a head with a learning rate of its own cannot repeat, and
        gives the step up. So does a commit that is refused.

        With overlap the commit is under way when this returns: the next loss follows it on the server, and what becomes
        of it is told by whatever comes next, `join` at the latest.
        """
        self.join()
        if not self._upstreams:
            return
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
        """Wait until no commit is under way; one that nobody answered is sent again first.

        Raises:
            TransientError: nobody answered again; the next call repeats it.
            RequestError, ServiceError: the step was refused.
        """
        if self._send is None:
            return
        try:
            self._send() if self._under_way is None else self._under_way.result()
        except TransientError:
            self._under_way = None  # it is sent again next time
            raise
        except ShardlossError:
            self._forget_commit()
            raise
        self._forget_commit()

    def _forget_commit(self) -> None:
        """What became of it is known."""
        self._send = self._under_way = self.session.follows = None

    def _begin_commit(self, learning_rate: float, grad_scale: float) -> None:
        tickets = [(part.ticket, wire_array(g)) for part, g in self._upstreams.items()]
        self._send = self.session.begin_commit(tickets, learning_rate=learning_rate, grad_scale=grad_scale)
        self._clear()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "shardloss-commit")
        self._under_way = self._thread.submit(copy_context().run, self._send)  # a trace follows it
        self.session.table.client.watch(self._under_way)

    def _commit_recorded(self, learning_rate: float, grad_scale: float) -> None:
        parts = [(part, wire_array(g)) for part, g in self._upstreams.items()]
        alone = [(part.alone, g) for part, g in parts if part.alone is not None]
        if alone and len(parts) > 1:
            raise InvalidArgument("a loss of a label distribution is a step of its own; this step has other losses")
        for step, g in alone:
            step(g, learning_rate, grad_scale)
        if not alone:
            tickets = [(part.ticket, g) for part, g in parts]
            self.session.commit(tickets, learning_rate=learning_rate, grad_scale=grad_scale)

    def drop(self) -> None:
        """Forget what was recorded, and give the step up unless a loss still waits for its backward."""
        self._forget_recorded()
        self._leave_if_nobody_waits()

    def _leave_if_nobody_waits(self) -> None:
        if self.session.num_parts and not self._waiting:
            self._give_up()

    def _give_up(self) -> None:
        self._clear()
        if self._send is not None:  # an abort would take the tickets of that step along, and the next commit does this
            self.session.skip()
            return
        with suppress(ShardlossError):  # a lost abort costs nothing: the next commit gives up what is below its step
            self.session.abort()

    def _clear(self) -> None:
        self._waiting.clear()
        self._forget_recorded()

    def _forget_recorded(self) -> None:
        self._upstreams = {}
        self._has_accumulated = False
        self.probe.grad = None

    def _on_accumulated(self, _probe: Tensor) -> None:
        self._has_accumulated = True


def wire_array(g: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """g as NumPy: float64 stays, everything else goes as float32."""
    return (g if g.dtype == torch.float64 else g.float()).numpy()


class RemoteOptimizer(torch.optim.Optimizer):
    """step() commits the parts whose backward has run, with the learning rate of its one param group.

    Its one parameter is the head's probe, so schedulers and torch.amp.GradScaler treat it as any optimizer. What a
    step does to the rows is the table's own optimizer; its state lives with the table, and state_dict holds lr alone.
    Leave the probe out of gradient clipping: its gradient is the scale of the step, not a norm. Neither copies nor
    pickles: a second optimizer would commit the same step.

    With overlap step() returns at once, and the table takes the step while the trainer goes on. The head's next loss
    follows it on the server, so training is the same to the bit. An error of the commit is raised by the next loss, the
    next step() or synchronize(); after a TransientError each of them sends the same commit again first. Other readers
    of the table see the step once it is applied: synchronize() waits for that.
    """

    def __init__(self, pending: Pending, lr: float, overlap: bool = False) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr = {lr} must be >= 0")
        self._pending, self._overlap = pending, overlap
        super().__init__([pending.probe], {"lr": lr})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupported("a remote optimizer is not copied; make one with head.optimizer(lr)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a remote table has one group.

        Raises:
            NotSupported: always, once the optimizer is made.
        """
        if self.param_groups:
            raise NotSupported("a remote optimizer steps its own table only; give other parameters their own optimizer")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Commit. With a closure, evaluate it first and return its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pending.check_in_use()
        self._pending.join()
        grad = self._pending.probe.grad
        if grad is None:  # as any optimizer passes over a parameter without a gradient
            self._pending.drop()
        else:
            self._pending.commit(float(self.param_groups[0]["lr"]), float(grad), self._overlap)
        return loss

    def synchronize(self) -> None:
        """Wait until the last step is applied.

        Raises:
            ShardlossError: what became of it instead; after a TransientError this repeats it.
        """
        self._pending.join()

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  (torch's signature)
        """Drop what was recorded and not committed; losses whose backward has not run yet stay valid."""
        self._pending.drop()
