"""Losses of lazy logits, computed by the service: one per row, differentiable in hidden, trained by `optimizer`."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss import types
from shardloss.compat import head
from shardloss.compat.arguments import named
from shardloss.lazy import LazyLogits

NAMES = {  # fields of the contract -> Paddle's arguments
    "labels": "label",
    "label_weights": "label",
    "label_distribution": "label",
    "columns.weights": "label",
    "margin.m1": "margin1",
    "margin.m2": "margin2",
    "margin.m3": "margin3",
    "sampler.num_sampled": "num_samples",
    "sampled_values.sampled": "customized_samples",
    "sampled_values.true_expected_count": "customized_probabilities",
    "sampled_values.sampled_expected_count": "customized_probabilities",
}


def losses_of(
    logits: LazyLogits,
    labels: Tensor,
    loss: types.FullSoftmax | types.SampledSoftmax,
    *,
    weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Return the losses [...] of labels [...] or [..., T] with weights [..., T]; ignore_index does not count."""
    table, hidden = logits.table, logits.hidden
    return head.losses_of(table, hidden, labels, loss, NAMES, label_weights=weights, ignore_index=ignore_index)


def hard_losses(
    logits: LazyLogits, ids: Tensor, ignore_index: int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the losses [...] of class ids [...], as `dense.hard_losses` does."""
    loss = types.FullSoftmax(label_smoothing=label_smoothing, logits=logits.transform)
    return losses_of(logits, ids, loss, ignore_index=ignore_index)


def soft_losses(logits: LazyLogits, label: Tensor) -> Tensor:
    """Return the losses [...] of soft labels [..., V], as `dense.soft_losses` does.

    Every class is a label with its weight. If there are at most max_num_true (of the server) classes, they are sent as
    ordinary labels; otherwise they are streamed as a label distribution, whose loss is a step of its own.
    """
    loss, num_classes = types.FullSoftmax(logits=logits.transform, unit_mass_gradient=True), logits.shape[-1]
    if num_classes > int(logits.table.client.info.limits["max_num_true"]):
        with named(NAMES):
            return head.head_of(logits.table).apply_distribution(logits.hidden, label, loss)
    return losses_of(logits, torch.arange(num_classes).expand(label.shape), loss, weights=label)
