"""Heads: torch modules over one autograd.Function, called like a local loss."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from shardloss import types, wire
from shardloss.errors import DoubleBackward, InvalidArgument
from shardloss.optimizer import Pending, RemoteOptimizer
from shardloss.table import Table
from shardloss.v1 import tensor_pb2

REDUCTIONS = ("mean", "sum", "none")


def fresh_seed() -> int:
    """A sampler seed from torch's global generator, so that torch.manual_seed decides it."""
    return int(torch.randint(0, 2**62, ()).item())


def to_wire(tensor: Tensor) -> tensor_pb2.Tensor:
    """The message of a tensor on any device, in its own dtype."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return wire.encode(tensor.view(torch.int16).numpy().view(np.uint16), bfloat16=True)
    return wire.encode(tensor.numpy())


def to_numpy(tensor: Tensor) -> wire.Array:
    """A tensor on any device as NumPy (bfloat16 widened to float32)."""
    tensor = tensor.detach().to("cpu")
    array: wire.Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def to_torch(array: wire.Array) -> Tensor:
    """A tensor with memory of its own."""
    return torch.from_numpy(array.copy())


class RemoteLoss(torch.autograd.Function):
    """Per-example losses [N] of hidden [N, D], already computed by the server in `result`.

    backward scales the rows of hidden_grad by the upstream g [N] and leaves g with the head for the next commit. The
    probe carries no loss: its gradient is 1 for each step, so that a GradScaler scales and checks it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probe: Tensor, result: types.LossResult, pending: Pending | None) -> Tensor:
        """The loss [N] on hidden's device."""
        ctx.result, ctx.pending = result, pending
        ctx.dtype, ctx.device = hidden.dtype, hidden.device
        loss = cast(wire.Array, result.loss)
        return to_torch(loss).to(hidden.device)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """(g * hidden_grad, the probe's mark).

        Raises:
            DoubleBackward: create_graph=True; the server has no second derivative.
        """
        if torch.is_grad_enabled():
            raise DoubleBackward("a remote loss has no second derivative; call backward without create_graph=True")
        grad = mark = None
        if ctx.needs_input_grad[0]:
            row_grad = to_torch(ctx.result.hidden_grad).to(ctx.device)
            grad = (g.to(row_grad.dtype)[:, None] * row_grad).to(ctx.dtype)
        if ctx.needs_input_grad[1] and ctx.pending is not None:
            mark = torch.tensor(ctx.pending.record(ctx.result.ticket, g.detach().to("cpu")))
        return grad, mark, None, None


class Head(torch.nn.Module):
    """A loss over a remote table: head(hidden, labels) -> loss.

    hidden [..., D] on any device and in any float dtype; labels [...] one class a row, or [..., T] for T true classes.
    Each call in training mode with gradients enabled is a part of the present step; `optimizer(lr)` gives the torch
    optimizer whose step() commits them. In eval mode or under no_grad a call leaves the table alone.
    """

    def __init__(self, table: Table, *, reduction: str, ignore_index: int | None, learning_rate: float | None) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InvalidArgument(f"reduction = {reduction!r} must be one of {', '.join(REDUCTIONS)}")
        self.table, self.reduction, self.ignore_index = table, reduction, ignore_index
        self.pending = Pending(table.session(), learning_rate)

    def optimizer(self, lr: float) -> RemoteOptimizer:
        """The optimizer of the remote table: step() commits, zero_grad() drops what was not committed."""
        return RemoteOptimizer(self.pending, lr)

    def extra_repr(self) -> str:
        """The table in repr(head)."""
        spec = self.table.spec
        return f"table={spec.name!r}, num_classes={spec.num_classes}, dim={spec.dim}, reduction={self.reduction!r}"

    def apply_loss(
        self, hidden: Tensor, labels: Tensor, loss: types.Loss, label_weights: Tensor | None = None
    ) -> Tensor:
        """Flatten, compute, reduce."""
        per_row = labels.dim() == hidden.dim()
        batch_shape, num_true = hidden.shape[:-1], labels.shape[-1] if per_row else 1
        if labels.shape[: len(batch_shape)] != batch_shape or labels.dim() not in (hidden.dim() - 1, hidden.dim()):
            raise InvalidArgument(
                f"labels {list(labels.shape)} do not fit hidden {list(hidden.shape)}; [...] or [..., T] is needed",
                field="labels",
            )
        flat_labels = labels.reshape(-1, num_true)
        flat_weights = None if label_weights is None else label_weights.reshape(-1, num_true)
        losses = self._losses(hidden.reshape(-1, hidden.shape[-1]), flat_labels, loss, flat_weights)
        if self.reduction == "none":
            return losses.view(batch_shape)
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / self._num_counted(flat_labels, flat_weights)

    def _losses(self, hidden: Tensor, labels: Tensor, loss: types.Loss, weights: Tensor | None) -> Tensor:
        differentiable = torch.is_grad_enabled()
        training = differentiable and self.training
        session = self.pending.session
        compute = session.compute_loss if training else partial(self.table.compute_loss, step=session.step)
        result = compute(
            to_wire(hidden),
            to_numpy(labels),
            loss,
            label_weights=None if weights is None else to_wire(weights),
            ignore_index=self.ignore_index,
            want_hidden_grad=differentiable and hidden.requires_grad,
        )
        pending = self.pending if training else None
        losses: Tensor = RemoteLoss.apply(hidden, self.pending.probe, result, pending)  # type: ignore[no-untyped-call]
        return losses

    def _num_counted(self, labels: Tensor, weights: Tensor | None) -> Tensor | int:
        if weights is not None or self.ignore_index is None:
            return len(labels)
        return (labels != self.ignore_index).any(1).sum()


class SoftmaxHead(Head):
    """The exact softmax over all classes: torch.nn.functional.cross_entropy(hidden @ W.T + b, labels)."""

    def forward(self, hidden: Tensor, labels: Tensor, label_weights: Tensor | None = None) -> Tensor:
        """loss = head(hidden [..., D], labels [...] or [..., T], label_weights [..., T] or None for 1/T)."""
        return self.apply_loss(hidden, labels, types.FullSoftmax(), label_weights)


class SampledSoftmaxHead(Head):
    """The sampled softmax: as tf.nn.sampled_softmax_loss, with candidates drawn by the server for each step.

    All parts of a step share their candidates, so micro-batches equal one batch.
    """

    def __init__(
        self,
        table: Table,
        loss: types.SampledSoftmax,
        *,
        reduction: str,
        ignore_index: int | None,
        learning_rate: float | None,
    ) -> None:
        super().__init__(table, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)
        self.loss = loss

    def forward(
        self, hidden: Tensor, labels: Tensor, sampled_values: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """loss = head(hidden [..., D], labels [...] or [..., T]).

        sampled_values = (sampled [S], true_expected_count [N, T], sampled_expected_count [S]) replaces the draw.
        """
        if sampled_values is None:
            return self.apply_loss(hidden, labels, self.loss)
        values = types.SampledValues(*map(to_numpy, sampled_values))
        loss = types.SampledSoftmax(
            sampled_values=values,
            remove_accidental_hits=self.loss.remove_accidental_hits,
            hit_removal=self.loss.hit_removal,
        )
        return self.apply_loss(hidden, labels, loss)
