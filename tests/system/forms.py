"""What the tests of argument forms share: a batch, two tables, and what a refusal names.

The tables of forms in test_*_forms.py were compared with TensorFlow 2.21, TensorFlow Recommenders 0.7.7 and Paddle
3.3.1. Their deliberate differences are in docs/tensorflow.md and docs/paddle.md. Any other form is refused under the
name that the caller wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import shardloss
import torch
from local_trainer import BATCH, DIM, NUM_CLASSES
from shardloss.errors import InvalidArgument, LimitExceeded, NotSupported
from shardloss_server.rpc.serve import Server
from torch import Tensor

T, S = 2, 5
Given = dict[str, Any]
LABELS = torch.arange(BATCH * T).reshape(BATCH, T) * 3 % NUM_CLASSES
INPUTS = torch.linspace(-1.0, 1.0, BATCH * DIM, dtype=torch.float64).reshape(BATCH, DIM)
SAMPLED = torch.tensor([3, 7, 3, 0, 9])  # all are labels, and 3 is repeated
TRUE_COUNT = torch.linspace(0.2, 0.9, BATCH * T, dtype=torch.float64).reshape(BATCH, T)
COUNT = torch.linspace(0.3, 0.7, S, dtype=torch.float64)
NAN = float("nan")


@contextmanager
def unchanged_table(server: Server, *, bias: bool) -> Iterator[shardloss.Table]:
    """Yield a table for calls that open no ticket."""
    with shardloss.connect(server.address, timeout_s=30.0) as client:
        spec = {"num_classes": NUM_CLASSES, "dim": DIM, "dtype": "float64", "initializer": shardloss.Normal(0.5)}
        table = client.create_table("forms", bias=bias, **spec)
        yield table
        assert table.info().num_open_tickets == 0
        client.delete_table(table.name)


def same(ours: object, theirs: object) -> bool:
    """Return True if two tensors, or each of the members of two tuples, are equal."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.allclose(ours, theirs, rtol=1e-12)


def refused(call: Callable[[], object]) -> tuple[type[Exception], str | None]:
    """Return the class of the error that a call raises and the field it names; the message names the field, too."""
    with pytest.raises((InvalidArgument, LimitExceeded, NotSupported)) as refusal, torch.no_grad():
        call()
    assert str(refusal.value.field) in str(refusal.value)
    return type(refusal.value), refusal.value.field
