"""The local sampled softmax in torch: a sparse embedding and torch.optim.Adagrad, one gather and one GEMM per step.

The shape: N, D, V, S. Candidates are distinct and log-uniform, drawn again for each step; logits are corrected by
-log Q, and a candidate that is a row's label is masked in that row. There are no biases.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.log_uniform import draw, log_expected_count
from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_embedding import TorchEmbedding


class TorchSampled(TorchEmbedding):
    """The sampled softmax with candidates shared by the batch; the base class implements the rest."""

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean sampled softmax loss of a batch."""
        sampled, num_tries = draw(self.s, self.v)
        ids = torch.cat([labels, sampled])
        log_q = log_expected_count(ids, num_tries, self.v)
        true_rows, sampled_rows = self.embedding(ids).split([self.n, self.s])
        true_logits = (hidden * true_rows).sum(1) - log_q[: self.n]
        logits = torch.addmm(-log_q[self.n :], hidden, sampled_rows.T)
        return F.cross_entropy(torch.cat([true_logits[:, None], mask_hits(logits, labels, sampled)], 1), self.target)


def mask_hits(logits: Tensor, labels: Tensor, sampled: Tensor) -> Tensor:
    """Mask logits [N, S] with -inf where a candidate is the row's label.

    The sampled ids ascend and are distinct, so a row has at most one hit.
    """
    places = torch.searchsorted(sampled, labels).clamp_(max=len(sampled) - 1)
    hit_rows = (sampled[places] == labels).nonzero()[:, 0]
    return logits.index_put_((hit_rows, places[hit_rows]), logits.new_tensor(float("-inf")))


if __name__ == "__main__":
    serve(TorchSampled)
