"""The part of the model that runs in the trainer: a bag of n-gram rows, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from examples.cities.ngrams import Bags


class Encoder(torch.nn.Module):
    """An encoder of bags: hidden [N, D] = sum of a bag's rows / sqrt(its number of grams); an empty bag gives 0.

    The distinct grams of a batch are gathered first, so that the gradient of weight [B, D] is sparse and lists each row
    once: about 15,000 rows for a batch of 1,024 names.
    """

    def __init__(self, num_buckets: int, dim: int, stddev: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_buckets, dim) * stddev)

    def forward(self, bags: Bags) -> Tensor:
        """Return hidden [N, D] of N bags."""
        distinct, place = np.unique(bags.gram_ids, return_inverse=True)
        rows = functional.embedding(torch.from_numpy(distinct).long(), self.weight, sparse=True)
        counts = torch.from_numpy(np.diff(bags.offsets)).clamp(min=1)
        sums = functional.embedding_bag(
            torch.from_numpy(place), rows, torch.from_numpy(bags.offsets), mode="sum", include_last_offset=True
        )
        return sums / counts.sqrt()[:, None]


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per row, for sparse gradients that list each row once.

    sum [B, 1] += mean over D of grad^2; p -= lr * grad / (sqrt(sum) + eps), like the table's optimizer of that name.
    """

    def __init__(self, weight: torch.nn.Parameter, lr: float, initial_accumulator: float, eps: float = 1e-10) -> None:
        super().__init__([weight], {"lr": lr, "eps": eps})
        self._sum = torch.full((len(weight), 1), initial_accumulator)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the rows that the current gradient lists."""
        assert closure is None
        group = self.param_groups[0]
        weight = group["params"][0]
        index, gradient = weight.grad._indices()[0], weight.grad._values()
        total = self._sum.index_select(0, index) + gradient.square().mean(1, keepdim=True)
        self._sum.index_copy_(0, index, total)
        rows = weight.index_select(0, index).sub_(gradient * (group["lr"] / (total.sqrt() + group["eps"])))
        weight.index_copy_(0, index, rows)
