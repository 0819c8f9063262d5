"""Interface to torch: the autograd.Function of server-computed losses, and conversion of tensors for the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch, _get_dispatch_mode, _TorchDispatchModeKey
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardloss import wire
from shardloss.errors import DoubleBackward, InvalidArgument, NotSupported
from shardloss.optimizer import Part, Pending, uncompiled

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TRACERS = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY)


def fresh_seed() -> int:
    """Return a sampler seed from torch's global generator, so that torch.manual_seed determines it."""
    check_sendable(torch.empty(0, device="cpu"), "the seed of a new head")
    return int(torch.randint(0, 2**62, (), device="cpu").item())


def check_tensor(value: object, field: str) -> None:
    """Raise `InvalidArgument` if value is not a torch tensor but, for example, a NumPy array, a list or a number.

    Raises:
        InvalidArgument: value is not a torch tensor; the error names field.
    """
    if not isinstance(value, Tensor):
        raise InvalidArgument(f"{field} is a {type(value).__name__}; a torch tensor is needed", field=field)


def check_sendable(tensor: Tensor, field: str) -> None:
    """Check that a tensor has values that can be sent to the service now.

    Raises:
        NotSupported: the call is inside a transform of torch.func or is being traced, or the tensor has no values of
            its own (a meta tensor, a sharded or nested tensor), is sparse, or carries a forward-mode tangent.
    """
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is not None:
        around = f"inside torch.func's {interpreter.key().name.lower()}"
    elif _functorch.is_legacy_batchedtensor(tensor):
        around = "for a batch of gradients"
    elif torch.jit.is_tracing() or any(map(_get_dispatch_mode, TRACERS)):
        around = "while it is traced or exported"
    elif is_traceable_wrapper_subclass(tensor):
        around = f"of a {type(tensor).__name__}"
    elif tensor.is_meta or tensor.layout != torch.strided:
        around = f"of a tensor on device {tensor.device} with layout {tensor.layout}"
    elif unpack_dual(tensor).tangent is not None:
        around = "with forward-mode differentiation"
    else:
        return
    raise NotSupported(
        f"{field}: a remote loss cannot be computed {around}: call it on plain tensors with values, and differentiate "
        "with backward() or torch.autograd.grad",
        field=field,
    )


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
    """Return a tensor on any device as a NumPy array; bfloat16 is widened to float32.

    Raises:
        NotSupported: the tensor has no values; see `check_sendable`.
    """
    check_sendable(tensor, "a tensor")
    tensor = tensor.detach().to("cpu")
    array: wire.Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def to_torch(array: wire.Array) -> Tensor:
    """Return a tensor with a copy of an array."""
    return torch.from_numpy(array.copy())


def to_saved(array: wire.Array | None) -> Tensor | None:
    """Return a tensor of a received array, without a copy if its memory can be written."""
    return None if array is None else torch.from_numpy(array if array.flags.writeable else array.copy())


def num_true_of(hidden: Tensor, labels: Tensor) -> int:
    """Return the number of labels per row for hidden [..., D]: 1 for labels [...], T for labels [..., T].

    Raises:
        InvalidArgument: hidden or labels is not a tensor, or their shapes do not match.
    """
    check_tensor(hidden, "hidden")
    check_sendable(hidden, "hidden")
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
    @uncompiled
    def forward(ctx: Any, probe: Tensor, pending: Pending, part: Part, loss: Tensor, *sent: Tensor) -> Tensor:
        """Return zeros like loss [N]; autograd then casts g to their dtype. sent are as in `Pending.record`."""
        ctx.pending, ctx.part = pending, part
        ctx.save_for_backward(*sent)
        return torch.zeros_like(loss)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Record g [N] and return the probe's gradient."""
        sent = ctx.saved_tensors
        return torch.tensor(ctx.pending.record(ctx.part, g, sent), device="cpu"), *[None] * (3 + len(sent))


class RemoteLoss(torch.autograd.Function):
    """Per-example losses [N] of hidden [N, D] and a scale [], already computed by the server with their gradients.

    backward multiplies the rows of hidden_grad [N, D] by the upstream g [N], reduces scale_grad [N] to its dot product
    with g, and passes g itself to mark [N]. mark is None if the table is not trained. The gradients are saved tensors,
    so a backward without retain_graph frees them.
    """

    @staticmethod
    @uncompiled
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
        ctx.save_for_backward(to_saved(hidden_grad), to_saved(scale_grad), loss[:0])
        ctx.scale = None if scale is None else (scale.dtype, scale.device, scale.shape)
        ctx.dtype, ctx.device = hidden.dtype, hidden.device
        return loss.to(hidden.device, copy=True)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Return (g * hidden_grad, g, sum(g * scale_grad)).

        Raises:
            DoubleBackward: backward was called with create_graph=True; the server computes no second derivatives.
            NotSupported: g is a batch of vectors, as torch.autograd.grad(is_grads_batched=True) passes.
        """
        hidden_grad, scale_grad, _ = ctx.saved_tensors  # torch's own error if an earlier backward freed them
        if torch.is_grad_enabled():
            raise DoubleBackward("a remote loss has no second derivative; call backward without create_graph=True")
        check_sendable(g, "the upstream gradient")
        grad = of_scale = None
        if ctx.needs_input_grad[0]:
            grad = (g[:, None] * hidden_grad.to(ctx.device, g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            dtype, device, shape = ctx.scale
            of_scale = (g.to("cpu", scale_grad.dtype) @ scale_grad).to(device, dtype).reshape(shape)
        mark = g.detach().to("cpu") if ctx.needs_input_grad[1] else None
        return grad, mark, of_scale, None, None, None
