"""The local sampled softmax in torch with candidates for each row: sparse embedding, bmm and torch.optim.Adagrad.

The shape: N, D, V, S. Each row has S uniform candidates, drawn again for each step. log Q is the same for every class
and cancels; a candidate that is its row's label is masked. There are no biases.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_embedding import TorchEmbedding


class TorchOwn(TorchEmbedding):
    """The sampled softmax with candidates for each row; the base class implements the rest."""

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean sampled softmax loss of a batch: one gather [N, 1 + S, D], one bmm."""
        sampled = torch.randint(self.v, (self.n, self.s))
        ids = torch.cat([labels[:, None], sampled], 1)
        logits = torch.bmm(self.embedding(ids), hidden[:, :, None])[:, :, 0]
        hits = torch.zeros_like(ids, dtype=torch.bool)
        torch.eq(sampled, labels[:, None], out=hits[:, 1:])
        return F.cross_entropy(logits.masked_fill_(hits, float("-inf")), self.target)


if __name__ == "__main__":
    serve(TorchOwn)
