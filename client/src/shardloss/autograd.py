"""Interface to torch: the autograd.Function of server-computed losses, and conversion of tensors for the wire."""

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
    """Return a sampler seed from torch's global generator, so that torch.manual_seed determines it."""
    return int(torch.randint(0, 2**62, (), device="cpu").item())


def check_tensor(value: object, field: str) -> None:
    """Raise `InvalidArgument` if value is not a torch tensor but, for example, a NumPy array, a list or a number.

    Raises:
        InvalidArgument: value is not a torch tensor; the error names field.
    """
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{field} is a {type(value).__name__}; a torch tensor is needed", field=field)


def to_wire(tensor: Tensor, field: str) -> wire.Encoded:
    """Encode a float tensor on any device in its own dtype; the content of a contiguous CPU tensor is not copied.

    Raises:
        InvalidArgument: the contract does not support the tensor's dtype.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidArgument(f"{field} is {tensor.dtype}; one of {FLOAT_DTYPES} is needed", field=field)
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return wire.encode_beside(tensor.view(torch.int16).numpy().view(np.uint16), bfloat16=True)
    return wire.encode_beside(tensor.numpy())


def to_ids(labels: Tensor) -> wire.Array:
    """Return class ids on any device as a NumPy array.

    Raises:
        InvalidArgument: labels are not int64 or int32.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise InvalidArgument(f"labels is {labels.dtype}; int64 or int32 class ids are needed", field="labels")
    return to_numpy(labels)


def to_numpy(tensor: Tensor) -> wire.Array:
    """Return a tensor on any device as a NumPy array; bfloat16 is widened to float32."""
    tensor = tensor.detach().to("cpu")
    array: wire.Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def to_torch(array: wire.Array) -> Tensor:
    """Return a tensor with a copy of an array."""
    return torch.from_numpy(array.copy())


def num_true_of(hidden: Tensor, labels: Tensor) -> int:
    """Return the number of labels per row for hidden [..., D]: 1 for labels [...], T for labels [..., T].

    Raises:
        InvalidArgument: hidden or labels is not a tensor, or their shapes do not match.
    """
    check_tensor(hidden, "hidden")
    check_tensor(labels, "labels")
    batch_shape = hidden.shape[:-1]
    if labels.shape == batch_shape:
        return 1
    if labels.shape[:-1] != batch_shape or labels.dim() != hidden.dim() or labels.shape[-1] == 0:
        raise InvalidArgument(
            f"labels {list(labels.shape)} do not match hidden {list(hidden.shape)}; [...] or [..., T] is needed",
            field="labels",
        )
    return labels.shape[-1]


class Mark(torch.autograd.Function):
    """The table's input to a loss: it adds zero to the loss, and its backward records g [N] for the next commit.

    The node is between the probe and the loss, so its backward runs exactly when a local table would receive a
    gradient: torch.autograd.grad(loss, hidden) does not train the table. The probe does not contribute to the loss; its
    gradient is 1 in each step, so that a GradScaler can scale and check it.
    """

    @staticmethod
    def forward(ctx: Any, probe: Tensor, pending: Pending, part: Part, loss: Tensor) -> Tensor:
        """Return zeros like loss [N]; autograd then casts g to their dtype."""
        ctx.pending, ctx.part = pending, part
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        """Record g [N] and return the probe's gradient."""
        return torch.tensor(ctx.pending.record(ctx.part, g), device="cpu"), None, None, None


class RemoteLoss(torch.autograd.Function):
    """Per-example losses [N] of hidden [N, D] and a scale [], already computed by the server with their gradients.

    backward multiplies the rows of hidden_grad [N, D] by the upstream g [N], reduces scale_grad [N] to its dot product
    with g, and passes g itself to mark [N]. mark is None if the table is not trained.
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
        """Return the loss [N] on hidden's device."""
        ctx.hidden_grad, ctx.scale_grad, ctx.scale = hidden_grad, scale_grad, scale
        ctx.dtype, ctx.device = hidden.dtype, hidden.device
        return loss.to(hidden.device, copy=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Return (g * hidden_grad, g, sum(g * scale_grad)).

        Raises:
            DoubleBackward: backward was called with create_graph=True; the server computes no second derivatives.
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
