"""Losses of dense logits, computed by torch: one loss per row, classes on the last axis."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardloss.compat.paddle.arguments import counted_of


def hard_losses(
    logits: Tensor,
    ids: Tensor,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    use_softmax: bool = True,
) -> Tensor:
    """Return -log p[label] [...] of logits [..., V], or of probabilities; 0 with gradient 0 for an ignored label.

    With label smoothing e, return (1 - e) * -log p[label] + e * mean(-log p).
    """
    counted = counted_of(ids, ignore_index)
    values = logits.log_softmax(-1) if use_softmax else logits
    at_label = values.gather(-1, ids.where(counted, 0)[..., None])[..., 0]
    at_label = at_label if use_softmax else at_label.where(counted, 1.0).log()
    losses = (-at_label).where(counted, 0.0)
    if not label_smoothing:
        return losses
    log_probs = values if use_softmax else values.log()
    return (1.0 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)


def soft_losses(logits: Tensor, label: Tensor, use_softmax: bool = True) -> Tensor:
    """Return -sum(label * log p) [...] of logits [..., V], or of probabilities; a class with label 0 adds nothing.

    The gradient with respect to logits is p - label, as in Paddle, even if a row's labels do not sum to 1; it is 0 if
    all are 0.
    """
    if use_softmax:
        return cast(Tensor, SoftLosses.apply(logits, label))  # type: ignore[no-untyped-call]
    there = label != 0
    return -(label.to(logits.dtype) * logits.where(there, 1.0).log()).sum(-1)


class SoftLosses(torch.autograd.Function):
    """The function -sum(label * log softmax(logits)) [...], differentiable in logits alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor) -> Tensor:
        """Return the losses [...]."""
        label, log_probs = label.detach().to(logits.dtype), logits.detach().log_softmax(-1)
        counts = (label != 0).any(-1, keepdim=True)
        ctx.save_for_backward((log_probs.exp() - label).where(counts, 0.0))
        return -(label * log_probs.where(label != 0, 0.0)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to logits, g (p - label)."""
        return g[..., None] * ctx.saved_tensors[0], None
