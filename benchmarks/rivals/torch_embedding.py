"""The base of the local sampled losses in torch: a sparse embedding, torch.optim.Adagrad and a step over a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.torch_batches import fresh_rows, tensors

THREADS = 2
LEARNING_RATE = 0.1


class TorchEmbedding(ABC):
    """An embedding [V, D] with sparse gradients."""

    def __init__(self, shape: dict[str, Any]) -> None:
        torch.set_num_threads(int(shape.get("threads", THREADS)))
        self.n, self.s, self.v = (int(shape[name]) for name in ("N", "S", "V"))
        self.embedding = torch.nn.Embedding(self.v, int(shape["D"]), sparse=True, _weight=fresh_rows(shape))
        self.optimizer = torch.optim.Adagrad(self.embedding.parameters(), lr=LEARNING_RATE)
        self.batches = tensors(shape)
        self.target = torch.zeros(self.n, dtype=torch.int64)  # the true class is column 0

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    def step(self) -> None:
        hidden, labels = next(self.batches)
        hidden.grad = None
        self.loss(hidden, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
