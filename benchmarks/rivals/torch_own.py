"""The local sampled softmax in torch, each row with its own candidates: sparse embedding, bmm, torch.optim.Adagrad.

The shape: N, D, V, S. Each row has S uniform candidates, drawn anew for each step. log Q is the same for every class
and so cancels; a candidate that is its row's label is masked. There are no biases.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_embedding import TorchEmbedding


class TorchOwn(TorchEmbedding):
    """Its loss; the rest is shared."""

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
