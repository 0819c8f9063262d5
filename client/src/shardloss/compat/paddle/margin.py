"""paddle.nn.functional.margin_cross_entropy: ArcFace, CosFace and SphereFace over cosines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardloss import types
from shardloss.autograd import to_numpy, to_torch
from shardloss.compat.arguments import named, real, truth
from shardloss.compat.paddle import dense, remote
from shardloss.compat.paddle.arguments import (
    Logits,
    check_group,
    check_logits,
    check_reduction,
    hard_labels,
    reduced,
)
from shardloss.errors import BadReply, InvalidArgument
from shardloss.lazy import LazyLogits, LazySoftmax, asked, ids_of, ranges
from shardloss.optimizer import uncompiled

LEAST_SINE = 1e-6  # keeps the slope finite at |cos| = 1, as in the server


def margin_cross_entropy(
    logits: Logits,
    label: Tensor,
    margin1: float = 1.0,
    margin2: float = 0.5,
    margin3: float = 0.0,
    scale: float = 64.0,
    group: object = None,
    return_softmax: bool = False,
    reduction: str | None = "mean",
) -> Tensor | tuple[Tensor, Tensor | LazySoftmax]:
    """Return the combined margin loss of cosines [..., V]; with return_softmax, (loss, softmax of the margined logits).

    At the label [...] or [..., 1], scale * (cos(margin1 * theta + margin2) - margin3) replaces scale * cos(theta). Lazy
    logits are used as cosines without any change; if their transform normalizes, they are true cosines. Their table
    must have no biases. reduction "none" or None returns [..., 1]; "mean" divides by the number of all rows. group must
    be None or False.

    Raises:
        InvalidArgument: an argument does not fit, or lazy logits have a scale or soft cap of their own, or biases.
        NotSupported: group is a group of ranks.
    """
    check_logits(logits)
    check_group(group)
    reduction = "none" if reduction is None else reduction
    check_reduction(reduction)
    ids = hard_labels(label, logits, logits.dim() - 1)
    margin = types.Margin(real(margin1, "margin1"), real(margin2, "margin2"), real(margin3, "margin3"))
    scale = real(scale, "scale")
    softmax: Tensor | LazySoftmax
    if isinstance(logits, LazyLogits):
        loss = remote_loss(logits, margin, scale)
        with named({"logits.scale": "scale"}):
            losses, softmax = remote.losses_of(logits, ids, loss), MarginSoftmax(logits, ids, loss)
    else:
        margined = with_margin(logits.float() if logits.dtype == torch.float16 else logits, ids, margin, scale)
        losses = dense.hard_losses(margined, ids).to(logits.dtype)
        softmax = margined.softmax(-1).to(logits.dtype)
    loss_value = reduced(losses, None, None, reduction, -1)
    return (loss_value, softmax) if truth(return_softmax, "return_softmax") else loss_value


def remote_loss(logits: LazyLogits, margin: types.Margin, scale: float) -> types.FullSoftmax:
    """Return the loss that the service is to compute.

    Raises:
        InvalidArgument: the logits are not cosines.
    """
    if replace(logits.transform, normalize=False) != types.LogitTransform():
        raise InvalidArgument(
            f"logits with {logits.transform} are not cosines; leave out their scale and soft_cap, and pass scale here",
            field="logits",
        )
    if logits.table.spec.bias:
        raise InvalidArgument(
            f"table {logits.table.name!r} has biases, and a biased logit is not a cosine: create it with bias=False",
            field="logits",
        )
    return types.FullSoftmax(margin=margin, logits=replace(logits.transform, scale=scale))


def with_margin(cosines: Tensor, ids: Tensor, margin: types.Margin, scale: float) -> Tensor:
    """Return scale * cosines [..., V], with the margin applied to the cosine of each label [...]."""
    at_label = ids[..., None]
    return scale * cosines.scatter(-1, at_label, of_label(cosines.gather(-1, at_label), margin))


def of_label(cosine: Tensor, margin: types.Margin) -> Tensor:
    """Return cos(m1 theta + m2) - m3 for a cosine cos(theta)."""
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return cosine - margin.m3
    moved: Tensor = MovedCosine.apply(cosine, margin.m1, margin.m2)  # type: ignore[no-untyped-call]
    return moved - margin.m3


class MovedCosine(torch.autograd.Function):
    """The function cos(m1 theta + m2) of cos(theta) clamped to [-1, 1]; outside, its derivative is the clamp's, 0."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, m1: float, m2: float) -> Tensor:
        """Return the moved cosine, cos(m1 theta + m2)."""
        theta = torch.acos(cosine.double().clamp(-1.0, 1.0))
        moved = m1 * theta + m2
        slope = m1 * torch.sin(moved) / torch.sin(theta).clamp(min=LEAST_SINE)
        ctx.save_for_backward(slope.where(cosine.abs() <= 1.0, 0.0).to(cosine.dtype))
        return torch.cos(moved).to(cosine.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the cosine: m1 sin(m1 theta + m2) / sin(theta), times g."""
        return g * ctx.saved_tensors[0], None, None


class MarginSoftmax(LazySoftmax):
    """The softmax [..., V] of margined, scaled lazy logits, which is never materialised.

    The denominator is computed from the table at the first request. If the table is trained after that, later results
    no longer match the denominator.
    """

    def __init__(self, logits: LazyLogits, ids: Tensor, loss: types.FullSoftmax) -> None:
        super().__init__(logits)
        self._ids, self._loss = ids, loss
        self._lse: Tensor | None = None

    @uncompiled
    def probabilities(self, class_ids: Sequence[int] | Tensor) -> Tensor:
        """Return the probabilities of class_ids [S], or of each row's own [..., S]; a row's label has its margin.

        Raises:
            ShardlossError: the same errors as `LazyLogits.probabilities`.
        """
        assert self._loss.margin is not None
        cosines, _ = asked(self.logits, class_ids, want_log_probs=False)
        is_label = torch.from_numpy(ids_of(class_ids)).to(self._ids.device) == self._ids[..., None]
        margined = torch.where(is_label, of_label(cosines, self._loss.margin), cosines)
        return (self._loss.logits.scale * margined - self.lse()[..., None]).exp()

    def probability_chunks(self, size: int) -> Iterator[tuple[range, Tensor]]:
        """Yield (class ids, their probabilities [..., chunk]) of classes 0 to V - 1, size classes at a time."""
        for class_ids in ranges(self.shape[-1], size):
            yield class_ids, self.probabilities(class_ids)

    def lse(self) -> Tensor:
        """Return the log-sum-exp [...] of the margined, scaled logits; the service computes it once."""
        if self._lse is None:
            table, hidden = self.logits.table, self.logits.hidden
            flat = to_numpy(hidden).reshape(-1, hidden.shape[-1])
            result = table.compute_loss(flat, to_numpy(self._ids).reshape(-1), self._loss, want_lse=True)
            if result.lse is None:
                raise BadReply("the reply lacks the log-sum-exp that was requested")
            self._lse = to_torch(result.lse).reshape(self._ids.shape).to(hidden.device)
        return self._lse
