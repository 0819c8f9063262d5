"""Losses of dense logits, by torch: one loss a row, classes on the last axis."""

from __future__ import annotations

from torch import Tensor

from shardloss.compat.head import IGNORED


def hard_losses(logits: Tensor, ids: Tensor, label_smoothing: float = 0.0, use_softmax: bool = True) -> Tensor:
    """-log p[label] [...] of logits [..., V], or of probabilities; 0 with gradient 0 where the label is IGNORED.

    With label smoothing (1 - e) * -log p[label] + e * mean(-log p).
    """
    counted = ids != IGNORED
    values = logits.log_softmax(-1) if use_softmax else logits
    at_label = values.gather(-1, ids.where(counted, 0)[..., None])[..., 0]
    at_label = at_label if use_softmax else at_label.where(counted, 1.0).log()
    losses = (-at_label).where(counted, 0.0)
    if not label_smoothing:
        return losses
    log_probs = values if use_softmax else values.log()
    return (1.0 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)


def soft_losses(logits: Tensor, label: Tensor, use_softmax: bool = True) -> Tensor:
    """-sum(label * log p) [...] of logits [..., V], or of probabilities; a class whose label is 0 adds nothing."""
    there = label != 0
    log_probs = logits.log_softmax(-1) if use_softmax else logits.where(there, 1.0).log()
    return -(label.to(log_probs.dtype) * log_probs.where(there, 0.0)).sum(-1)
