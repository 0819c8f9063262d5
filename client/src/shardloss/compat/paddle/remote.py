"""Losses of lazy logits, computed by the service: one per row, differentiable in hidden, trained by `optimizer`."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss import types
from shardloss.compat.head import head_of
from shardloss.lazy import LazyLogits


def losses_of(
    logits: LazyLogits, labels: Tensor, loss: types.FullSoftmax | types.SampledSoftmax, weights: Tensor | None = None
) -> Tensor:
    """Return the losses [...] of labels [...] or [..., T] with weights [..., T]; an IGNORED label does not count."""
    return head_of(logits.table).apply_loss(logits.hidden, labels, loss, weights)


def hard_losses(logits: LazyLogits, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the losses [...] of class ids [...], as `dense.hard_losses` does."""
    return losses_of(logits, ids, types.FullSoftmax(label_smoothing=label_smoothing, logits=logits.transform))


def soft_losses(logits: LazyLogits, label: Tensor) -> Tensor:
    """Return the losses [...] of soft labels [..., V], as `dense.soft_losses` does.

    Every class is a label with its weight. If there are at most max_num_true (of the server) classes, they are sent as
    ordinary labels; otherwise they are streamed as a label distribution, whose loss is a step of its own.
    """
    loss, num_classes = types.FullSoftmax(logits=logits.transform, unit_mass_gradient=True), logits.shape[-1]
    if num_classes > int(logits.table.client.info.limits["max_num_true"]):
        return head_of(logits.table).apply_distribution(logits.hidden, label, loss)
    return losses_of(logits, torch.arange(num_classes).expand(label.shape), loss, label)
