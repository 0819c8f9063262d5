"""The cost of the current call so far: seconds and operations, accumulated wherever they are spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from shardloss_server.shard.record import Part, RowCandidates, TableSpec

MAX_PHASES = 64  # phases of one call in a trace: an exact question over a large table has thousands
SHORT_WAIT_S = 1e-4  # a shorter wait is only the time to acquire a lock
NO_WORKER: Mapping[int, float] = {}


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a call: its name, its begin and end, and the phases inside it.

    name is "wait", "plan", "fanout" or "finish". began and ended are readings of time.perf_counter, in seconds.
    computed_s is the computing time of each worker, by its index.
    """

    name: str
    began: float
    ended: float
    computed_s: Mapping[int, float]
    inner: tuple[Phase, ...] = ()


class Phases:
    """The phases of one call, ordered by their ends, as a trace shows them."""

    def __init__(self) -> None:
        self.seen: list[Phase] = []
        self.num_left_out = 0

    def note(self, phase: Phase) -> None:
        """Add a phase if there is room, and count it as left out otherwise."""
        if len(self.seen) < MAX_PHASES:
            self.seen.append(phase)
        else:
            self.num_left_out += 1

    def close(self, name: str, began: float, ended: float, num_before: int) -> None:
        """Add a phase that has ended and contains all phases except the first num_before."""
        inner = tuple(self.seen[num_before:])
        self.seen[num_before:] = [Phase(name, began, ended, NO_WORKER, inner)]


@dataclass(slots=True)
class Meter:
    """The seconds and operations of one call. No time is counted twice, except that kernel_s is part of fanout_s.

    wait_s: for locks, turns, and steps before this one. fanout_s: from the start of work on the shards until all have
    answered. kernel_s: computing time of the slowest worker of each fan-out. flops: a product and its addition count
    as 2. phases: None unless a trace is recorded.
    """

    wait_s: float = 0.0
    plan_s: float = 0.0
    fanout_s: float = 0.0
    kernel_s: float = 0.0
    finish_s: float = 0.0
    flops: int = 0
    phases: Phases | None = None

    def note(self, name: str, began: float, ended: float, computed_s: Mapping[int, float] = NO_WORKER) -> None:
        """Add a wait or a fan-out that has ended to the phases."""
        if self.phases is not None and (name != "wait" or ended - began >= SHORT_WAIT_S):
            self.phases.note(Phase(name, began, ended, computed_s))

    @property
    def elsewhere_s(self) -> float:
        """Seconds that were spent neither on planning nor on finishing."""
        return self.wait_s + self.fanout_s

    def planning(self) -> AbstractContextManager[None]:
        """Count the time spent in this context as planning, without waits and fan-outs."""
        return self._spending("plan")

    def finishing(self) -> AbstractContextManager[None]:
        """Count the time spent in this context as finishing, without waits and fan-outs."""
        return self._spending("finish")

    @contextmanager
    def _spending(self, name: str) -> Iterator[None]:
        began, elsewhere, phases = time.perf_counter(), self.elsewhere_s, self.phases
        num_before = 0 if phases is None else len(phases.seen)
        yield
        ended = time.perf_counter()
        spent_s = ended - began - (self.elsewhere_s - elsewhere)
        if name == "plan":
            self.plan_s += spent_s
        else:
            self.finish_s += spent_s
        if phases is not None:
            phases.close(name, began, ended, num_before)


METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


def meter() -> Meter:
    """Return the meter of the current call; outside a call, return one that is never read."""
    return METER.get() or Meter()


def flops_of(part: Part, spec: TableSpec) -> int:
    """Return the operations of one pass over a part: 2 D per logit, as in h W^T; each gradient takes as many again.

    Logits: N V over all classes, plus N T with a margin; N (C + T) with C shared candidates; N (S + T) with S
    candidates for each row.
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
    """Return the operations of num_logits logits: 2 D each."""
    return 2 * spec.dim * num_logits


def of_columns(weights: Tensor, spec: TableSpec) -> int:
    """Return the operations of one pass over columns [N, C] of a label distribution."""
    return products(weights.numel(), spec)
