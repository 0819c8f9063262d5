"""What the present call has cost so far: seconds and operations, added up wherever they are spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from shardloss_server.shard.record import Part, RowCandidates, TableSpec

MAX_PHASES = 64  # of one call that a trace shows: an exact question of a large table has thousands
SHORT_WAIT_S = 1e-4  # below it a wait is but the taking of a lock
NO_WORKER: Mapping[int, float] = {}


@dataclass(frozen=True, slots=True)
class Phase:
    """ "wait", "plan", "fanout" or "finish", between moments of time.perf_counter, with the phases inside it.

    computed_s: what each worker computed, by its index.
    """

    name: str
    began: float
    ended: float
    computed_s: Mapping[int, float]
    inner: tuple[Phase, ...] = ()


class Phases:
    """The phases of one call in the order of their ends, as a trace shows them."""

    def __init__(self) -> None:
        self.seen: list[Phase] = []
        self.num_left_out = 0

    def note(self, phase: Phase) -> None:
        """Keep it where there is room."""
        if len(self.seen) < MAX_PHASES:
            self.seen.append(phase)
        else:
            self.num_left_out += 1

    def close(self, name: str, began: float, ended: float, num_before: int) -> None:
        """A phase is over that holds all phases but the first num_before."""
        inner = tuple(self.seen[num_before:])
        self.seen[num_before:] = [Phase(name, began, ended, NO_WORKER, inner)]


@dataclass(slots=True)
class Meter:
    """Seconds of one call, none of them in two places; kernel_s is inside fanout_s. flops: 2 a product and its sum.

    wait_s: for locks, turns, and steps before this one. fanout_s: from the start of work on the shards until all have
    answered. kernel_s: what the slowest worker of each fan-out computed. phases: kept where a trace is recorded.
    """

    wait_s: float = 0.0
    plan_s: float = 0.0
    fanout_s: float = 0.0
    kernel_s: float = 0.0
    finish_s: float = 0.0
    flops: int = 0
    phases: Phases | None = None

    def note(self, name: str, began: float, ended: float, computed_s: Mapping[int, float] = NO_WORKER) -> None:
        """A wait or a fan-out is over."""
        if self.phases is not None and (name != "wait" or ended - began >= SHORT_WAIT_S):
            self.phases.note(Phase(name, began, ended, computed_s))

    @property
    def elsewhere_s(self) -> float:
        """What was neither planning nor finishing."""
        return self.wait_s + self.fanout_s

    def planning(self) -> AbstractContextManager[None]:
        """Count what is spent here, waits and fan-outs left out, as planning."""
        return self._spending("plan")

    def finishing(self) -> AbstractContextManager[None]:
        """Count what is spent here, waits and fan-outs left out, as finishing."""
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
