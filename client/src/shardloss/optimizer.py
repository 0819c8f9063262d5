"""The optimizer of a remote table, as torch sees it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardloss.errors import InvalidArgument, RequestError, ShardlossError
from shardloss.session import Session


class Pending:
    """What backward left for the next commit: g [N] by ticket. One step of one session.

    probe is the scalar whose gradient tells how far g is scaled: 1 after backward, 1/scale once a GradScaler has
    unscaled it, not finite where g is not.
    """

    def __init__(self, session: Session, learning_rate: float | None = None) -> None:
        self.session, self.learning_rate = session, learning_rate
        self.probe = torch.zeros((), requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._on_accumulated)  # type: ignore[no-untyped-call]
        self._upstreams: dict[str, Tensor] = {}
        self._has_accumulated = False

    def record(self, ticket: str, g: Tensor) -> float:
        """Add g [N] to a ticket and return the gradient of the probe: 1 for the first part of a step, then 0.

        Not finite g gives a not finite gradient, so that a GradScaler skips the step. With a learning rate of its own
        the head commits here. What was recorded before is forgotten where somebody has cleared the probe's gradient,
        as a local parameter's would be.

        Raises:
            InvalidArgument: g is not finite, and the head commits by itself: the step is given up.
        """
        if self._has_accumulated and self.probe.grad is None:
            self._clear()
        is_first = not self._upstreams
        known = self._upstreams.get(ticket)
        self._upstreams[ticket] = g.clone() if known is None else known + g
        if not torch.isfinite(g).all():
            if self.learning_rate is not None:
                self.drop()
                raise InvalidArgument("the loss has a gradient that is not finite; the table's step was given up")
            return float("nan")
        if self.learning_rate is not None:
            self.commit(self.learning_rate, 1.0)
        return float(is_first)

    def commit(self, learning_rate: float, grad_scale: float) -> None:
        """Commit what was recorded as one step; nothing recorded is no step.

        After a TransientError the recorded parts stay, so a second call repeats the same commit. A commit that is
        refused gives the whole step up.
        """
        if not self._upstreams:
            return
        parts = [(ticket, wire_array(g)) for ticket, g in self._upstreams.items()]
        try:
            self.session.commit(parts, learning_rate=learning_rate, grad_scale=grad_scale)
        except RequestError:
            self._clear()
            with suppress(ShardlossError):
                self.session.abort()
            raise
        self._clear()

    def drop(self) -> None:
        """Forget what was recorded, and give the step up unless a loss still waits for its backward."""
        num_recorded, num_parts = len(self._upstreams), self.session.num_parts
        self._clear()
        if num_recorded and num_recorded == num_parts:
            self.session.abort()

    def _on_accumulated(self, _probe: Tensor) -> None:
        self._has_accumulated = True

    def _clear(self) -> None:
        self._upstreams = {}
        self._has_accumulated = False
        self.probe.grad = None


def wire_array(g: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """g as NumPy: float64 stays, everything else goes as float32."""
    return (g if g.dtype == torch.float64 else g.float()).numpy()


class RemoteOptimizer(torch.optim.Optimizer):
    """step() commits the parts whose backward has run, with the learning rate of its one param group.

    Its one parameter is the head's probe, so schedulers and torch.amp.GradScaler treat it as any optimizer. What a
    step does to the rows is the table's own optimizer; its state lives with the table.
    """

    def __init__(self, pending: Pending, lr: float) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr = {lr} must be >= 0")
        self._pending = pending
        super().__init__([pending.probe], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Commit. With a closure, evaluate it first and return its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad = self._pending.probe.grad
        if grad is None:  # as any optimizer passes over a parameter without a gradient
            self._pending.drop()
        else:
            self._pending.commit(float(self.param_groups[0]["lr"]), float(grad))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  (torch's signature)
        """Drop what was recorded and not committed; losses whose backward has not run yet stay valid."""
        self._pending.drop()
