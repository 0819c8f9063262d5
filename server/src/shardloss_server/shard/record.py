"""Values that cross the port of a shard group: what to score, what came out, what to apply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.optimizer import OptimizerSpec
from shardloss_server.numerics.partial import Partial, Target
from shardloss_server.placement import Placement

SIGNS_OF_NO_MEMORY = ("allocate memory", "out of memory")  # torch's CPU and CUDA allocators say so


class OutOfMemory(Exception):
    """There is no memory for what was asked for; nothing changed."""


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Around work that has changed nothing yet.

    Raises:
        OutOfMemory: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError, OutOfMemoryError being one
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in SIGNS_OF_NO_MEMORY):
            raise
        raise OutOfMemory(f"no memory for {what}") from None


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table with every default filled in. dtype is "float32", "float64" or "bfloat16"."""

    name: str
    num_classes: int
    dim: int
    dtype: str
    bias: bool
    placement: Placement
    initializer: Initializer
    optimizer: OptimizerSpec

    @property
    def compute_dtype(self) -> str:
        """dtype of logits, reductions, biases and optimizer state: float64 in a float64 table, else float32."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to score, in the table's compute dtype.

    hidden [N, D]; labels [N, T] int64, padding is -1; label_weights y [N, T], 0 on padding; mass [N] = sum_t y_t.
    """

    hidden: Tensor
    labels: Tensor
    label_weights: Tensor
    mass: Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of a sampled loss; ids ascend and are distinct.

    class_ids [C]; log_weight [C] and log_weight_after_hit [C] as `correction.Folded`; label_log_weight [N, T] = -log Q
    of the true columns.
    """

    class_ids: Tensor
    log_weight: Tensor
    log_weight_after_hit: Tensor | None
    label_log_weight: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """One planned batch, complete in itself: candidates None means every class (the full softmax)."""

    batch: Batch
    candidates: Candidates | None


@dataclass(frozen=True, slots=True)
class Score:
    """One shard's answer to a part, at a version of the table."""

    partial: Partial
    target: Target
    version: int


@dataclass(frozen=True, slots=True)
class RowGradient:
    """Gradient of some rows of one table: class_ids [M] ascending and distinct, rows [M, D], biases [M]."""

    class_ids: Tensor
    rows: Tensor
    biases: Tensor


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the table's gradient of one part needs beside the part: lse [N] float64 and g [N] (already scaled)."""

    lse: Tensor
    g: Tensor


@dataclass(frozen=True, slots=True)
class StepKey:
    """Who asked for a step: exactly-once is promised for it. digest tells one payload from another."""

    session: str
    step: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One optimizer step: the self-contained input of `ShardTable.apply_`. parts and upstreams belong pairwise."""

    version: int
    key: StepKey
    learning_rate: float
    staleness: int
    parts: tuple[Part, ...]
    upstreams: tuple[Upstream, ...]


@dataclass(frozen=True, slots=True)
class RowWrite:
    """Rows to overwrite as one version: class_ids [M] distinct, rows [M, D], biases [M] or None (stay)."""

    version: int
    class_ids: Tensor
    rows: Tensor
    biases: Tensor | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows read at one version, in the order asked: rows [M, D] in storage dtype, biases [M]."""

    class_ids: Tensor
    rows: Tensor
    biases: Tensor
    version: int
