"""The batches of `benchmarks.rivals.batches` as tensors of a dtype."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.batches import NUM_BATCHES, SEED, batches

LOSS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tensors(shape: dict[str, Any], seed: int = SEED) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden [N, D], a leaf that requires its gradient, and labels [N], endlessly."""
    dtype = LOSS_DTYPES[str(shape.get("dtype", "float32"))]
    pool = [
        (torch.from_numpy(hidden).to(dtype).requires_grad_(), torch.from_numpy(labels))
        for hidden, labels in islice(batches(shape, seed), NUM_BATCHES)
    ]
    return cycle(pool)


def fresh_rows(shape: dict[str, Any]) -> Tensor:
    """Return initial rows [V, D], uniform on +-1/sqrt(D) like a table's."""
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.empty(int(shape["V"]), int(shape["D"])).uniform_(-1, 1, generator=generator)
    return rows.mul_(shape["D"] ** -0.5).to(LOSS_DTYPES[str(shape.get("dtype", "float32"))])
