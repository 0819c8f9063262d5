"""The `ShardGroup` port: a group of shards that scores parts and applies records, wherever its workers run.

Every verb starts its work at once and returns a `Pending`. A caller that holds one lock per table while it starts verbs
gives all the table's shards the same order of work, and can wait outside the lock. Results are in shard order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from shardloss_server.cluster.stats import SeenWorker
from shardloss_server.machine import Pool
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
    """A worker no longer holds a shard: it died and its rows are lost, even if it has been restarted since."""


class Pending(Protocol[T_co]):
    """A call in progress on one or more workers."""

    def result(self, timeout_s: float) -> T_co:
        """Wait for the work and return its result.

        Raises:
            TimeoutError: not done within timeout_s; the work continues and its result is dropped.
            WorkerLost, ShardMissing, OutOfMemory: see those classes.
        """

    @property
    def computed_s(self) -> Mapping[int, float]:
        """Seconds that each worker computed, by index, once `result` has returned; the remaining time is transport."""

    def abandon(self) -> None:
        """Give up the result, so that work that has not begun can be skipped. Only for work that changes nothing."""


class Staged(Protocol):
    """A part placed where the workers of a group can read it, for as long as this object lives."""


@dataclass(frozen=True, slots=True)
class Order:
    """A record without its parts, which are staged: the owner sends it, and each shard adds the parts."""

    version: int
    key: StepKey
    learning_rate: float
    staleness: int
    upstreams: tuple[Upstream, ...]

    def record(self, parts: Sequence[Part]) -> Record:
        """Return the self-contained record, with the parts in it."""
        return Record(self.version, self.key, self.learning_rate, self.staleness, tuple(parts), tuple(self.upstreams))


class ShardGroup(Protocol):
    """Shards of any number of tables on W workers; each holds neighbouring shards (`placement.hosted_shards`)."""

    @property
    def num_workers(self) -> int:
        """Number of worker processes; 0 if the shards are in this process."""

    @property
    def devices(self) -> Sequence[str]:
        """The torch device of each worker, by worker index."""

    def backlog(self) -> int:
        """Return the number of abandoned calls that have not finished; a call started now waits behind them."""

    def failure(self) -> str | None:
        """Return why this group can no longer start or watch its workers, for good; None if it can."""

    def create(self, spec: TableSpec, max_sessions: int) -> Pending[object]:
        """Allocate the shards of a table, whose rows `fill` must then fill."""

    def fill(self, table: str, piece: int, num_pieces: int) -> Pending[list[int]]:
        """Set the initial values of one of num_pieces equal pieces of every shard."""

    def memory(self, num_shards: int, num_bytes: int) -> Pending[list[Sequence[Pool]]]:
        """Read the memory of each worker, by index, that would host a table of num_shards.

        A worker with less than num_bytes first returns what it has freed to its machine.
        """

    def drop(self, table: str) -> Pending[object]:
        """Free the shards of a table; unknown ones are ignored."""

    def stage(self, part: Part) -> Staged:
        """Place a part where the workers can read it in later verbs."""

    def score(self, table: str, staged: Staged, with_gradient: bool, keep: bool) -> Pending[list[Score]]:
        """Score a part on every shard; some answers may be merged. With keep, shards keep what the step can reuse."""

    def mine(self, table: str, staged: Staged, k: int) -> Pending[list[Mined]]:
        """Find the k best candidates of each row of hidden on every shard."""

    def begin_labels(self, table: str, name: str) -> Pending[list[int]]:
        """Have every shard collect the gradient of a label distribution and discard that of any other."""

    def add_labels(
        self, table: str, staged: Staged, first_class: int, weights: Tensor, g: Tensor | None
    ) -> Pending[list[LabelTarget]]:
        """Compute the target of a piece of a label distribution: weights [N, C] of classes from first_class on.

        If g [N] is given, the shards also collect its gradient.
        """

    def forget_labels(self, table: str) -> Pending[list[int]]:
        """Have every shard free the gradient of a label distribution that it collected."""

    def gradient(self, table: str, staged: Staged, upstream: Upstream) -> Pending[list[RowGradient]]:
        """Compute the gradient of every shard's touched rows."""

    def apply(self, table: str, order: Order, staged: Sequence[Staged]) -> Pending[list[int]]:
        """Apply one step on every shard; a shard that has already applied it only returns its version."""

    def forget_record(self, table: str, version: int) -> Pending[list[int]]:
        """Have every shard free the record that created a version, which all have applied."""

    def write(self, table: str, write: RowWrite) -> Pending[list[int]]:
        """Overwrite rows on every shard."""

    def read(self, table: str, class_ids: Tensor, with_state: bool = False) -> Pending[list[Rows]]:
        """Read each shard's rows among class_ids, with their optimizer state if with_state."""

    def scan(self, table: str, question: Question, piece: int, num_pieces: int) -> Pending[list[ScanAnswer]]:
        """Answer an exact question over one slice of every shard's rows."""

    def asked_logits(
        self, table: str, hidden: Tensor, class_ids: Tensor, transform: Transform = PLAIN
    ) -> Pending[list[AskedLogits]]:
        """Compute logits and keys of class_ids [N, S]: each shard gives those of its own classes, 0 for all others."""

    def stats(self, timeout_s: float) -> list[SeenWorker]:
        """Return every worker's stats by index; a worker that does not answer in time is reported as unreachable."""

    def applied_versions(self, table: str) -> Pending[list[int]]:
        """Return the version of every shard."""

    def repair(self, table: str, timeout_s: float) -> int:
        """Bring every shard to the highest version among them by replaying records, and return that version.

        Raises:
            TimeoutError, WorkerLost, ShardMissing: not all shards answered; repeat the call, or give up the table.
        """

    def close(self) -> None:
        """Stop every worker that this group started. Idempotent."""
