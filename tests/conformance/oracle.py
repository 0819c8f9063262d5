"""The oracle of a table in tests: float64 rows, trained by autograd over `numerics.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from shardloss import FullSoftmax, SampledSoftmax, SampledValues
from shardloss.types import Loss
from shardloss_server.numerics import reference
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """hidden [N, D], labels [N, T], the caller's draw (None: full softmax), and the upstream gradient g [N]."""

    hidden: np.ndarray
    labels: np.ndarray
    draw: SampledValues | None
    g: np.ndarray

    @property
    def loss(self) -> Loss:
        """The client's loss object for this batch."""
        return FullSoftmax() if self.draw is None else SampledSoftmax(sampled_values=self.draw)

    def rows(self, chosen: slice) -> Batch:
        """Return a micro-batch of some rows over the same draw."""
        draw = self.draw
        if draw is not None:
            draw = SampledValues(draw.sampled, draw.true_expected_count[chosen], draw.sampled_expected_count)
        return Batch(self.hidden[chosen], self.labels[chosen], draw, self.g[chosen])


def random_batch(
    rng: np.random.Generator, num_classes: int, dim: int, *, num_rows: int = 7, num_true: int = 2, num_sampled: int = 6
) -> Batch:
    """Return a random batch; its draw may have repeats, and num_sampled = 0 is the full softmax."""
    hidden = rng.normal(size=(num_rows, dim))
    labels = rng.integers(0, num_classes, (num_rows, num_true))
    g = rng.normal(size=num_rows)
    if num_sampled == 0:
        return Batch(hidden, labels, None, g)
    sampled = rng.integers(0, num_classes, num_sampled)
    draw = SampledValues(sampled, rng.uniform(0.1, 2.0, labels.shape), rng.uniform(0.1, 2.0, num_sampled))
    return Batch(hidden, labels, draw, g)


def losses(weights: Tensor, biases: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
    """Return the reference's per-example losses [N], differentiable."""
    labels = torch.tensor(batch.labels)
    if batch.draw is None:
        even = torch.full(labels.shape, 1.0 / labels.shape[1], dtype=torch.float64)
        return reference.full_softmax(weights, biases, hidden, labels, even)
    counts = torch.tensor(batch.draw.true_expected_count), torch.tensor(batch.draw.sampled_expected_count)
    return reference.sampled_softmax(weights, biases, hidden, labels, torch.tensor(batch.draw.sampled), *counts)


@dataclass
class Replica:
    """A table's rows [V, D] and biases [V] in float64, outside any service."""

    rows: np.ndarray
    biases: np.ndarray

    def loss(self, batch: Batch) -> np.ndarray:
        """Return the per-example losses [N]."""
        hidden, weights, biases = (torch.tensor(a) for a in (batch.hidden, self.rows, self.biases))
        return losses(weights, biases, hidden, batch).numpy()

    def gradients(self, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return the gradients of the summed g . loss in rows and biases, and of sum(loss) in each batch's hidden."""
        weights = torch.tensor(self.rows, requires_grad=True)
        biases = torch.tensor(self.biases, requires_grad=True)
        hiddens = [torch.tensor(batch.hidden, requires_grad=True) for batch in batches]
        each = [losses(weights, biases, h, b) for h, b in zip(hiddens, batches, strict=True)]
        hidden_grads = [
            torch.autograd.grad(loss.sum(), hidden, retain_graph=True)[0].numpy()
            for loss, hidden in zip(each, hiddens, strict=True)
        ]
        objective = torch.stack([(torch.tensor(b.g) * x).sum() for b, x in zip(batches, each, strict=True)]).sum()
        objective.backward()
        assert weights.grad is not None
        assert biases.grad is not None
        return weights.grad.numpy(), biases.grad.numpy(), hidden_grads

    def step(self, batches: Sequence[Batch], learning_rate: float) -> Replica:
        """Return the replica after one plain SGD step over all batches."""
        rows, biases, _ = self.gradients(batches)
        return Replica(self.rows - learning_rate * rows, self.biases - learning_rate * biases)

    def assert_close(self, rows: np.ndarray, biases: np.ndarray, tolerance: float = 1e-10) -> None:
        """Assert that rows and biases equal the replica's, up to rounding."""
        np.testing.assert_allclose(rows, self.rows, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(biases, self.biases, rtol=tolerance, atol=tolerance)
