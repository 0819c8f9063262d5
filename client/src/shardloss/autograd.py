"""The border to torch: the autograd.Function of losses that the server computed, tensors to and from the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardloss import wire
from shardloss.errors import DoubleBackward, InvalidArgument
from shardloss.optimizer import Part, Pending

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fresh_seed() -> int:
    """A sampler seed from torch's global generator, so that torch.manual_seed decides it."""
    return int(torch.randint(0, 2**62, (), device="cpu").item())


def check_tensor(value: object, field: str) -> None:
    """Refuse what is no torch tensor: an array of NumPy's, a list, a number.

    Raises:
        InvalidArgument: it is none.
    """
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{field} is a {type(value).__name__}; a torch tensor is needed", field=field)


def to_wire(tensor: Tensor, field: str) -> wire.Encoded:
    """A float tensor on any device beside its message, in its own dtype; on the CPU its memory, not a copy.

    Raises:
        InvalidArgument: the contract has no such dtype.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidArgument(f"{field} is {tensor.dtype}; one of {FLOAT_DTYPES} is needed", field=field)
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return wire.encode_beside(tensor.view(torch.int16).numpy().view(np.uint16), bfloat16=True)
    return wire.encode_beside(tensor.numpy())


def to_ids(labels: Tensor) -> wire.Array:
    """Class ids on any device as NumPy.

    Raises:
        InvalidArgument: they are not int64 or int32.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise InvalidArgument(f"labels is {labels.dtype}; int64 or int32 class ids are needed", field="labels")
    return to_numpy(labels)


def to_numpy(tensor: Tensor) -> wire.Array:
    """A tensor on any device as NumPy (bfloat16 widened to float32)."""
    tensor = tensor.detach().to("cpu")
    array: wire.Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def to_torch(array: wire.Array) -> Tensor:
    """A tensor with memory of its own."""
    return torch.from_numpy(array.copy())


def num_true_of(hidden: Tensor, labels: Tensor) -> int:
    """T of labels [...] (1) or [..., T] beside hidden [..., D].

    Raises:
        InvalidArgument: they are no tensors, or do not fit.
    """
    check_tensor(hidden, "hidden")
    check_tensor(labels, "labels")
    batch_shape = hidden.shape[:-1]
    if labels.shape == batch_shape:
        return 1
    if labels.shape[:-1] != batch_shape or labels.dim() != hidden.dim() or labels.shape[-1] == 0:
        raise InvalidArgument(
            f"labels {list(labels.shape)} do not fit hidden {list(hidden.shape)}; [...] or [..., T] is needed",
            field="labels",
        )
    return labels.shape[-1]


class Mark(torch.autograd.Function):
    """The table's side of a loss: nothing is added to it, and its upstream g [N] is left for the next commit.

    Between the probe and the loss, so that it runs where a local table would get its gradient, and only there:
    torch.autograd.grad(loss, hidden) trains no table. The probe carries no loss: its gradient is 1 for each step, so
    that a GradScaler scales and checks it.
    """

    @staticmethod
    def forward(ctx: Any, probe: Tensor, pending: Pending, part: Part, loss: Tensor) -> Tensor:
        """Zeros like loss [N]: autograd casts g to their dtype."""
        ctx.pending, ctx.part = pending, part
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        """The probe's gradient."""
        return torch.tensor(ctx.pending.record(ctx.part, g), device="cpu"), None, None, None


class RemoteLoss(torch.autograd.Function):
    """Per-example losses [N] of hidden [N, D] and a scale [], already computed by the server with their gradients.

    backward scales the rows of hidden_grad [N, D], and sums scale_grad [N], by the upstream g [N]; it hands g itself to
    the mark [N], or to None where the table is not trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        mark: Tensor | None,
        scale: Tensor | None,
        loss: Tensor,
        hidden_grad: wire.Array | None,
        scale_grad: wire.Array | None,
    ) -> Tensor:
        """The loss [N] on hidden's device."""
        ctx.hidden_grad, ctx.scale_grad, ctx.scale = hidden_grad, scale_grad, scale
        ctx.dtype, ctx.device = hidden.dtype, hidden.device
        return loss.to(hidden.device, copy=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """(g * hidden_grad, g, sum(g * scale_grad)).

        Raises:
            DoubleBackward: create_graph=True; the server has no second derivative.
        """
        if torch.is_grad_enabled():
            raise DoubleBackward("a remote loss has no second derivative; call backward without create_graph=True")
        grad = of_scale = None
        if ctx.needs_input_grad[0]:
            row_grad = to_torch(ctx.hidden_grad).to(ctx.device)
            grad = (g[:, None] * row_grad.to(g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            each = to_torch(ctx.scale_grad)
            of_scale = (g.to("cpu", each.dtype) @ each).to(ctx.scale).reshape(ctx.scale.shape)
        mark = g.detach().to("cpu") if ctx.needs_input_grad[1] else None
        return grad, mark, of_scale, None, None, None
