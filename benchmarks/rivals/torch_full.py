"""The local exact softmax in torch with SGD, written as in a trainer.

The shape: N, D, V, dtype, and form:

- "eager": F.cross_entropy(h @ W.T, y);
- "compile": torch.compile of the same function, forward and backward;
- "lce": F.linear_cross_entropy called without options, which is torch's reference path;
- "lce_chunked": F.linear_cross_entropy with default LinearCrossEntropyOptions(), which never materialises [N, V].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.protocol import serve
from benchmarks.rivals.torch_batches import fresh_rows, tensors

THREADS = 2
LEARNING_RATE = 0.1
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(hidden: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss, from materialised logits [N, V]."""
    return F.cross_entropy(hidden @ rows.T, labels)


def chunked(hidden: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss by torch's own chunked function."""
    return F.linear_cross_entropy(hidden, rows, labels, options=torch.nn.LinearCrossEntropyOptions())


FORMS: dict[str, Callable[[], LossOf]] = {
    "eager": lambda: cross_entropy,
    "compile": lambda: torch.compile(cross_entropy, dynamic=False),
    "lce": lambda: F.linear_cross_entropy,
    "lce_chunked": lambda: chunked,
}


class TorchFull:
    """The parameter W [V, D] and its optimizer."""

    def __init__(self, shape: dict[str, Any]) -> None:
        torch.set_num_threads(int(shape.get("threads", THREADS)))
        self.rows = torch.nn.Parameter(fresh_rows(shape))
        self.optimizer = torch.optim.SGD([self.rows], lr=LEARNING_RATE)
        self.loss = FORMS[str(shape["form"])]()
        self.batches = tensors(shape)

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    def step(self) -> None:
        hidden, labels = next(self.batches)
        hidden.grad = None
        self.loss(hidden, self.rows, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    serve(TorchFull)
