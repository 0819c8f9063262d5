"""Losses of lazy logits, by the service: one loss a row, differentiable in hidden; the table learns by `optimizer`."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss import types
from shardloss.autograd import SampledSoftmaxHead
from shardloss.compat.paddle.arguments import IGNORED
from shardloss.errors import NotSupported
from shardloss.lazy import LazyLogits
from shardloss.optimizer import RemoteOptimizer
from shardloss.table import Table


def head_of(table: Table) -> SampledSoftmaxHead:
    """The one head through which these functions train a table: the losses of a step share its session."""

    def make() -> SampledSoftmaxHead:
        return table.sampled_softmax(1, reduction="none", ignore_index=IGNORED)

    return table.client.attached(__name__, table.name, make, lambda head: shape_of(head.table) == shape_of(table))


def shape_of(table: Table) -> tuple[int, int, str, bool]:
    """What tells a table from another one made anew under its name."""
    spec = table.spec
    return spec.num_classes, spec.dim, spec.dtype, spec.bias


def optimizer(table: Table, lr: float) -> RemoteOptimizer:
    """The torch optimizer of a table that these functions train: step() commits the losses whose backward has run."""
    return head_of(table).optimizer(lr)


def losses_of(
    logits: LazyLogits, labels: Tensor, loss: types.FullSoftmax | types.SampledSoftmax, weights: Tensor | None = None
) -> Tensor:
    """Losses [...] of labels [...] or [..., T] with weights [..., T]; an IGNORED label does not count."""
    return head_of(logits.table).apply_loss(logits.hidden, labels, loss, weights)


def hard_losses(logits: LazyLogits, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """As `dense.hard_losses` of logits."""
    return losses_of(logits, ids, types.FullSoftmax(label_smoothing=label_smoothing, logits=logits.transform))


def soft_losses(logits: LazyLogits, label: Tensor) -> Tensor:
    """As `dense.soft_losses` of logits: every class is a label with its weight.

    Raises:
        NotSupported: more classes than a row may have labels.
    """
    num_classes, most = logits.shape[-1], int(logits.table.client.info.limits["max_num_true"])
    if num_classes > most:
        raise NotSupported(
            f"soft labels of {num_classes} classes: the server takes {most} labels a row; use hard labels, or "
            "table.softmax()(hidden, class_ids, label_weights) with the classes whose label is not 0"
        )
    class_ids = torch.arange(num_classes).expand(label.shape)
    return losses_of(logits, class_ids, types.FullSoftmax(logits=logits.transform), label)
