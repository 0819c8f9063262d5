"""What the present call has cost so far: seconds and operations, added up wherever they are spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from shardloss_server.shard.record import Part, RowCandidates, TableSpec


@dataclass(slots=True)
class Meter:
    """Seconds of one call, none of them in two places; kernel_s is inside fanout_s. flops: 2 a product and its sum.

    wait_s: for locks, turns, and steps before this one. fanout_s: from the start of work on the shards until all have
    answered. kernel_s: what the slowest worker of each fan-out computed.
    """

    wait_s: float = 0.0
    plan_s: float = 0.0
    fanout_s: float = 0.0
    kernel_s: float = 0.0
    finish_s: float = 0.0
    flops: int = 0

    @property
    def elsewhere_s(self) -> float:
        """What was neither planning nor finishing."""
        return self.wait_s + self.fanout_s

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Count what is spent here, waits and fan-outs left out, as planning."""
        began, elsewhere = time.perf_counter(), self.elsewhere_s
        yield
        self.plan_s += time.perf_counter() - began - (self.elsewhere_s - elsewhere)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Count what is spent here, waits and fan-outs left out, as finishing."""
        began, elsewhere = time.perf_counter(), self.elsewhere_s
        yield
        self.finish_s += time.perf_counter() - began - (self.elsewhere_s - elsewhere)


METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


def meter() -> Meter:
    """The present call's; what no call pays for is counted for nobody."""
    return METER.get() or Meter()


def flops_of(part: Part, spec: TableSpec) -> int:
    """Operations of one pass over a part: 2 D for each of its logits, as h W^T has them; its gradients have as many.

    Logits: N V over all classes, and N T more with a margin; N (C + T) of C shared candidates; N (S + T) of each row's.
    """
    num_rows, num_true = part.batch.labels.shape
    num_logits = num_rows * num_true if part.has_columns_apart else 0
    if part.candidates is None:
        num_logits += num_rows * spec.num_classes
    else:
        drawn = part.candidates.class_ids.numel()
        num_logits += drawn if isinstance(part.candidates, RowCandidates) else num_rows * drawn
    return products(num_logits, spec)


def products(num_logits: int, spec: TableSpec) -> int:
    """Operations of so many logits."""
    return 2 * spec.dim * num_logits


def of_columns(weights: Tensor, spec: TableSpec) -> int:
    """Operations of one pass over columns [N, C] of a label distribution."""
    return products(weights.numel(), spec)
