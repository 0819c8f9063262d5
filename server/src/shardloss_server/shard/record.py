"""Values that cross the port of a shard group: what to score, what came out, what to apply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from shardloss_server.numerics.initializer import Initializer
from shardloss_server.numerics.objective import Objective
from shardloss_server.numerics.optimizer import OptimizerSpec, State
from shardloss_server.numerics.partial import Spread, Statistics, Target
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
    """A table with every default filled in. dtype is "float32", "float64" or "bfloat16".

    count_labels: commits count their labels, for the samplers that draw by them.
    """

    name: str
    num_classes: int
    dim: int
    dtype: str
    bias: bool
    placement: Placement
    initializer: Initializer
    optimizer: OptimizerSpec
    count_labels: bool = False

    @property
    def compute_dtype(self) -> str:
        """dtype of logits, reductions, biases and optimizer state: float64 in a float64 table, else float32."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to score, in the table's compute dtype.

    hidden [N, D], unit vectors where the objective normalises, times its scale; labels [N, T] int64, padding is -1;
    label_weights y [N, T], 0 on padding; mass [N] = the sum of all the row's weights; spread [N] the weight that label
    smoothing gives to every class v, times u_v, or None without it.
    """

    hidden: Tensor
    labels: Tensor
    label_weights: Tensor
    mass: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of a sampled loss, shared by the batch; ids ascend.

    class_ids [C]; log_weight [C] and log_weight_after_hit [C] as `correction.Folded`; label_log_weight [N, T] = -log Q
    of the true columns. hit_ids [C] and label_hit_ids [N, T] (padding negative) are compared in place of class ids to
    find accidental hits; None: class ids are.
    """

    class_ids: Tensor
    log_weight: Tensor
    log_weight_after_hit: Tensor | None
    label_log_weight: Tensor
    hit_ids: Tensor | None = None
    label_hit_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowCandidates:
    """Candidates of each row's own: class_ids [N, S], log_weight [N, S] (-inf: removed), label_log_weight [N, T]."""

    class_ids: Tensor
    log_weight: Tensor
    label_log_weight: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Part:
    """One planned batch, complete in itself: candidates None means every class.

    class_weights u [V] are those of label smoothing; None: all 1. distribution names the label distribution whose
    gradient every shard has collected for its own rows (`ShardTable.add_labels_`), or is "".
    """

    batch: Batch
    candidates: Candidates | RowCandidates | None
    objective: Objective = field(default_factory=Objective)
    class_weights: Tensor | None = None
    distribution: str = ""

    @property
    def is_full(self) -> bool:
        """Whether every class is a column."""
        return self.candidates is None

    @property
    def has_columns_apart(self) -> bool:
        """Whether true labels are columns beside the candidates, which lack them; else they are among all classes."""
        return self.candidates is not None or self.objective.margin is not None


@dataclass(frozen=True, slots=True)
class Score:
    """The answer of a shard, or of a run of them, to a part; spread is None without label smoothing."""

    statistics: Statistics
    target: Target
    spread: Spread | None
    version: int
    shards: range


@dataclass(frozen=True, slots=True)
class LabelTarget:
    """One shard's part of a piece of a label distribution: its target, and mass [N] float64 = sum of its y."""

    target: Target
    mass: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class Mined:
    """The best candidates of each row, by logit descending and then id ascending: each [N, <= k].

    logits are corrected; log_weight is that of the candidate in this row, -inf where it is an accidental hit.
    """

    class_ids: Tensor
    logits: Tensor
    log_weight: Tensor
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
    """Rows to overwrite as one version: class_ids [M] distinct, rows [M, D], biases [M] or None (stay).

    State [M, W] by name of rows and of biases is overwritten too; what is not named stays, as num_commits does where it
    is None.
    """

    version: int
    class_ids: Tensor
    rows: Tensor
    biases: Tensor | None
    weight_state: State = field(default_factory=dict)
    bias_state: State = field(default_factory=dict)
    num_commits: int | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows read at one version, in the order asked: rows [M, D] in storage dtype, biases [M].

    State [M, W] by name of rows and of biases, where asked for; num_commits at that version.
    """

    class_ids: Tensor
    rows: Tensor
    biases: Tensor
    version: int
    num_commits: int
    weight_state: State = field(default_factory=dict)
    bias_state: State = field(default_factory=dict)
