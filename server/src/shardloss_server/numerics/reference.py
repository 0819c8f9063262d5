"""The slow, obvious definition of every loss, in whatever dtype it is given: the oracle of the tests.

Unsharded and differentiable by autograd; nothing outside the tests calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_softmax(weights: Tensor, biases: Tensor, hidden: Tensor, labels: Tensor, label_weights: Tensor) -> Tensor:
    """Per-example -sum_t y_t log softmax(h W^T + b)[label_t] [N].

    weights [V, D], biases [V], hidden [N, D], labels [N, T] (-1 is padding), label_weights y [N, T] (0 on padding).
    A row whose y are all 0 has loss 0.
    """
    log_probs = torch.log_softmax(hidden @ weights.T + biases, dim=1)
    return -(label_weights * log_probs.gather(1, labels.clamp(min=0))).sum(1)


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
    """Per-example sampled softmax loss [N], as tf.nn.sampled_softmax_loss (TensorFlow 2.21) computes it.

    labels [N, T] without padding, sampled [S] with repeats, expected counts Q [N, T] and [S]; hit_removal is "none",
    "every" or "last". Logits are x.w + b - log Q over T true and S sampled columns; each true column has target 1/T.
    """
    true_logits = torch.einsum("nd,ntd->nt", hidden, weights[labels]) + biases[labels] - true_expected_count.log()
    logits = hidden @ weights[sampled].T + biases[sampled] - sampled_expected_count.log()
    hit = (labels[:, :, None] == sampled[None, None, :]).any(1)
    if hit_removal == "last":
        later_copy = (sampled[:, None] == sampled[None, :]).triu(1).any(1)
        hit = hit & ~later_copy
    if hit_removal != "none":
        logits = logits.masked_fill(hit, -torch.inf)
    log_probs = torch.log_softmax(torch.cat([true_logits, logits], dim=1), dim=1)
    return -log_probs[:, : labels.shape[1]].mean(1)
