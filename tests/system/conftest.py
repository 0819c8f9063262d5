"""A table and a batch of the size of the local trainer, for the tests of trainers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES


@pytest.fixture
def table(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> shardloss.Table:
    return client.create_table(fresh_name(), num_classes=NUM_CLASSES, dim=DIM, num_shards=3, dtype="float64")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D] that requires a gradient, and labels [N]."""
    hidden = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(0, NUM_CLASSES, (BATCH,))
