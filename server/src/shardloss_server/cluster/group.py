"""The port: a group of shards that scores parts and applies records, wherever its workers run.

Every verb starts its work at once and returns a `Pending`: whoever calls verbs of one table under one lock gives all
its shards the same order of work, and waits outside the lock. Results come in shard order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from shardloss_server.cluster.stats import SeenWorker
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import (
    LabelTarget,
    Mined,
    Part,
    Record,
    RowGradient,
    Rows,
    RowWrite,
    Score,
    StepKey,
    TableSpec,
    Upstream,
)
from shardloss_server.shard.scan import PLAIN, AskedLogits, Question, ScanAnswer

T_co = TypeVar("T_co", covariant=True)


class WorkerLost(Exception):
    """A worker did not answer because it or its node died; whether it did the work is unknown."""


class ShardMissing(Exception):
    """A worker holds no such shard: it died and its rows are gone, whether or not it has been started anew."""


class Pending(Protocol[T_co]):
    """Work under way."""

    def result(self, timeout_s: float) -> T_co:
        """Wait for the work.

        Raises:
            TimeoutError: not done within timeout_s; the work goes on and its result is dropped.
            WorkerLost, ShardMissing, OutOfMemory: see there.
        """

    @property
    def computed_s(self) -> Mapping[int, float]:
        """Seconds that each worker computed, by its index, once `result` has returned: the rest is the way."""

    def abandon(self) -> None:
        """Nobody waits for it any more: it need not begin, but may have. Only for work that changes nothing."""


class Staged(Protocol):
    """A part placed where the workers of a group can read it, for as long as this object lives."""


@dataclass(frozen=True, slots=True)
class Order:
    """A record whose parts are staged: what the owner sends so that each shard makes the record whole."""

    version: int
    key: StepKey
    learning_rate: float
    staleness: int
    upstreams: tuple[Upstream, ...]

    def record(self, parts: Sequence[Part]) -> Record:
        """The self-contained record."""
        return Record(self.version, self.key, self.learning_rate, self.staleness, tuple(parts), tuple(self.upstreams))


class ShardGroup(Protocol):
    """Shards of any number of tables on W workers; each holds neighbouring ones (`placement.hosted_shards`)."""

    @property
    def num_workers(self) -> int:
        """Worker processes; 0 where the shards live in this process."""

    @property
    def devices(self) -> Sequence[str]:
        """Where each worker computes."""

    def backlog(self) -> int:
        """Abandoned work that is not finished yet: it stands before whatever is started now."""

    def create(self, spec: TableSpec, max_sessions: int) -> Pending[object]:
        """Allocate and fill the shards of a table."""

    def drop(self, table: str) -> Pending[object]:
        """Free the shards of a table; unknown ones are ignored."""

    def stage(self, part: Part) -> Staged:
        """Place a part for later verbs."""

    def score(self, table: str, staged: Staged, with_gradient: bool, keep: bool) -> Pending[list[Score]]:
        """Score a part on every shard, some of whose answers may be merged; keep what its step can use."""

    def mine(self, table: str, staged: Staged, k: int) -> Pending[list[Mined]]:
        """The k best candidates of each row on every shard."""

    def begin_labels(self, table: str, name: str) -> Pending[list[int]]:
        """Have every shard collect the gradient of a label distribution, and forget that of another."""

    def add_labels(
        self, table: str, staged: Staged, first_class: int, weights: Tensor, g: Tensor | None
    ) -> Pending[list[LabelTarget]]:
        """A piece of a label distribution: weights [N, C] of classes from first_class on; collected with g [N]."""

    def forget_labels(self, table: str) -> Pending[list[int]]:
        """Have every shard free what it collected."""

    def gradient(self, table: str, staged: Staged, upstream: Upstream) -> Pending[list[RowGradient]]:
        """Gradient of every shard's touched rows."""

    def apply(self, table: str, order: Order, staged: Sequence[Staged]) -> Pending[list[int]]:
        """Apply one step on every shard; a shard that has it already answers its version."""

    def write(self, table: str, write: RowWrite) -> Pending[list[int]]:
        """Overwrite rows on every shard."""

    def read(self, table: str, class_ids: Tensor, with_state: bool = False) -> Pending[list[Rows]]:
        """Rows of each shard among class_ids, with their optimizer state where asked."""

    def scan(self, table: str, question: Question, piece: int, num_pieces: int) -> Pending[list[ScanAnswer]]:
        """Answer an exact question over one slice of every shard's rows."""

    def asked_logits(
        self, table: str, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN
    ) -> Pending[list[AskedLogits]]:
        """Logits and keys of class_ids [N, S]: each shard's own, 0 for all others."""

    def stats(self, timeout_s: float) -> list[SeenWorker]:
        """Every worker by index; one that does not answer in time, dead or busy, is told as such."""

    def applied_versions(self, table: str) -> Pending[list[int]]:
        """The version of every shard."""

    def repair(self, table: str, timeout_s: float) -> int:
        """Bring every shard to the highest version that any of them has, by its records, and return that version.

        Raises:
            TimeoutError, WorkerLost, ShardMissing: not all shards answered; repeat, or give the table up.
        """

    def close(self) -> None:
        """Stop every worker that this group started. Idempotent."""
