"""The local sampled softmax in torch: a sparse embedding and torch.optim.Adagrad, one gather and one GEMM a step.

The shape: N, D, V, S. Candidates are distinct and log-uniform, drawn anew for each step; logits are corrected by
-log Q, and a candidate that is a row's label is masked in that row. There are no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.log_uniform import draw, log_expected_count
from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_batches import fresh_rows, tensors

THREADS = 2
LEARNING_RATE = 0.1


class TorchSampled:
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
        """Mean sampled softmax loss of a batch."""
        sampled, num_tries = draw(self.s, self.v)
        ids = torch.cat([labels, sampled])
        log_q = log_expected_count(ids, num_tries, self.v)
        true_rows, sampled_rows = self.embedding(ids).split([self.n, self.s])
        true_logits = (hidden * true_rows).sum(1) - log_q[: self.n]
        logits = torch.addmm(-log_q[self.n :], hidden, sampled_rows.T)
        return F.cross_entropy(torch.cat([true_logits[:, None], mask_hits(logits, labels, sampled)], 1), self.target)


def mask_hits(logits: Tensor, labels: Tensor, sampled: Tensor) -> Tensor:
    """logits [N, S] with -inf where a candidate is the row's label; sampled ascend and are distinct: one hit a row."""
    places = torch.searchsorted(sampled, labels).clamp_(max=len(sampled) - 1)
    hit_rows = (sampled[places] == labels).nonzero()[:, 0]
    return logits.index_put_((hit_rows, places[hit_rows]), logits.new_tensor(float("-inf")))


if __name__ == "__main__":
    serve(TorchSampled)
