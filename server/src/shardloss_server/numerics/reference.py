"""The slow, obvious definition of every loss, in the dtype of its arguments: the oracle of the tests.

Unsharded and differentiable by autograd; only the tests call it. Logits are computed from hidden and rows, columns are
chosen from logits, and a loss is computed from columns. Losses over all classes take a batch, sampled ones one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shardloss_server.numerics.margin import Margin

# Logits


def logits_of(
    weights: Tensor,
    biases: Tensor,
    hidden: Tensor,
    scale: float | Tensor = 1.0,
    soft_cap: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Return z [N, V] = cap(scale * (hidden . row + bias)) of weights [V, D], biases [V] and hidden [N, D]."""
    if normalize:
        weights, hidden = functional.normalize(weights, eps=1e-12), functional.normalize(hidden, eps=1e-12)
    logits = scale * (hidden @ weights.T + biases)
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def with_margin(logits: Tensor, margin: Margin | None, scale: float | Tensor) -> Tensor:
    """Turn true logits scale * cos(theta) into scale * (cos(m1 theta + m2) - m3)."""
    if margin is None:
        return logits
    theta = torch.acos((logits / scale).clamp(-1.0, 1.0))
    return scale * (torch.cos(margin.m1 * theta + margin.m2) - margin.m3)


# Losses over all classes


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Return sum_v y_v (-log softmax(z)_v + z_loss lse^2) [N], y_v = u_v ((1 - s) sum_t [label_t = v] y_t + s / V).

    logits [N, V]; labels [N, T] (-1 is padding), label_weights y [N, T] (0 on padding), class_weights u [V]; a row
    whose y are all 0 has loss 0. Source: torch.nn.functional.cross_entropy; z_loss from PaLM, section 5.
    """
    num_classes = logits.shape[1]
    target = torch.zeros_like(logits).scatter_add(1, labels.clamp(min=0), label_weights.to(logits.dtype))
    counts = (label_weights.sum(1, keepdim=True) != 0).to(logits.dtype)
    target = (1.0 - label_smoothing) * target + label_smoothing / num_classes * counts
    if class_weights is not None:
        target = target * class_weights
    lse = logits.logsumexp(1, keepdim=True)
    return (target * (lse - logits + z_loss * lse * lse)).sum(1)


def sigmoid_loss(logits: Tensor, labels: Tensor, label_weights: Tensor) -> Tensor:
    """Return sum_v softplus(z_v) - sum_t y_t z_t [N]; arguments as in `softmax_loss`."""
    loss = softplus(logits).sum(1)
    loss = loss - (label_weights * logits.gather(1, labels.clamp(min=0))).sum(1)
    return torch.where(label_weights.sum(1) == 0, 0.0, loss)


def softplus(logits: Tensor) -> Tensor:
    """Return log(1 + exp(z))."""
    return torch.logaddexp(logits, torch.zeros_like(logits))


# Losses over sampled columns of one row


@dataclass(frozen=True)
class Draw:
    """One row's draw: its labels [T], sampled [S] with repeats, log Q of both, and the ids to find accidental hits."""

    labels: Tensor
    sampled: Tensor
    label_log_q: Tensor
    sampled_log_q: Tensor
    label_hit_ids: Tensor
    sampled_hit_ids: Tensor
    hit_removal: str


def kept(draw: Draw) -> Tensor:
    """Return a mask [S] of the sampled columns to keep: all but accidental hits or, with "last", their last copies."""
    ids = draw.sampled_hit_ids
    hit = (draw.label_hit_ids[:, None] == ids[None, :]).any(0)
    has_later_copy = (ids[:, None] == ids[None, :]).triu(1).any(1)
    return ~{"none": torch.zeros_like(hit), "every": hit, "last": hit & ~has_later_copy}[draw.hit_removal]


def columns(
    logits: Tensor, draw: Draw, margin: Margin | None = None, scale: float | Tensor = 1.0, num_hardest: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the corrected logits of the true columns [T] and of the kept sampled ones, from a row's logits [V]."""
    true = with_margin(logits[draw.labels], margin, scale) - draw.label_log_q
    stays = kept(draw)
    ids, sampled = draw.sampled[stays], (logits[draw.sampled] - draw.sampled_log_q)[stays]
    if num_hardest:
        ranked = sorted(range(len(ids)), key=lambda i: (-float(sampled[i]), int(ids[i])))
        sampled = sampled[ranked[:num_hardest]]
    return true, sampled


def sampled_softmax_loss(true: Tensor, sampled: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return lse - mean of the true columns + z_loss lse^2 []. Source: tf.nn.sampled_softmax_loss (TensorFlow 2.21)."""
    lse = torch.cat([true, sampled]).logsumexp(0)
    return lse - true.mean() + z_loss * lse * lse


def sampled_logistic_loss(true: Tensor, sampled: Tensor) -> Tensor:
    """Sum the columns' logistic losses []: target 1/T for true columns, else 0. Source: tf.nn.nce_loss."""
    return softplus(torch.cat([true, sampled])).sum() - true.mean()


# Plain losses of whole batches


def full_softmax(weights: Tensor, biases: Tensor, hidden: Tensor, labels: Tensor, label_weights: Tensor) -> Tensor:
    """Return the softmax losses [N] over all classes; arguments as in `logits_of` and `softmax_loss`."""
    return softmax_loss(logits_of(weights, biases, hidden), labels, label_weights)


def sampled_softmax(
    weights: Tensor,
    biases: Tensor,
    hidden: Tensor,
    labels: Tensor,
    sampled: Tensor,
    true_expected_count: Tensor,
    sampled_expected_count: Tensor,
    hit_removal: str = "every",
) -> Tensor:
    """Return the sampled softmax losses [N] over a draw that the batch shares.

    labels [N, T] without padding, sampled [S] with repeats, expected counts Q [N, T] and [S].
    """
    losses = [torch.zeros(0, dtype=weights.dtype)]
    for logits, own, count in zip(logits_of(weights, biases, hidden), labels, true_expected_count, strict=True):
        draw = Draw(own, sampled, count.log(), sampled_expected_count.log(), own, sampled, hit_removal)
        losses.append(sampled_softmax_loss(*columns(logits, draw))[None])
    return torch.cat(losses)
