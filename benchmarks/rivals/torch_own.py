"""The local sampled softmax in torch, each row with its own candidates: sparse embedding, bmm, torch.optim.Adagrad.

The shape: N, D, V, S. Each row has S uniform candidates, drawn anew for each step. log Q is the same for every class
and so cancels; a candidate that is its row's label is masked. There are no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_batches import fresh_rows, tensors

THREADS = 2
LEARNING_RATE = 0.1


class TorchOwn:
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

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean sampled softmax loss of a batch: one gather [N, 1 + S, D], one bmm."""
        sampled = torch.randint(self.v, (self.n, self.s))
        ids = torch.cat([labels[:, None], sampled], 1)
        logits = torch.bmm(self.embedding(ids), hidden[:, :, None])[:, :, 0]
        hits = torch.zeros_like(ids, dtype=torch.bool)
        torch.eq(sampled, labels[:, None], out=hits[:, 1:])
        return F.cross_entropy(logits.masked_fill_(hits, float("-inf")), self.target)


if __name__ == "__main__":
    serve(TorchOwn)
