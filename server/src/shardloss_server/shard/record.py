"""Values that cross the port of a shard group: parts to score, their scores, and records to apply."""

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

SIGNS_OF_NO_MEMORY = ("allocate memory", "out of memory")  # in errors of torch's CPU and CUDA allocators


class OutOfMemory(Exception):
    """Failure to allocate memory for a request; nothing was changed."""


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Run a block that has changed nothing yet, and report a failed allocation in it.

    Raises:
        OutOfMemory: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in SIGNS_OF_NO_MEMORY):
            raise
        raise OutOfMemory(f"not enough memory for {what}") from None


@dataclass(frozen=True, slots=True)
class TableSpec:
    """The definition of a table with every default filled in. dtype is "float32", "float64" or "bfloat16".

    If count_labels is True, commits count their labels for the samplers that draw by class counts.
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
        """Dtype of logits, reductions, biases and optimizer state: float64 in a float64 table, else float32."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to score, in the table's compute dtype.

    hidden [N, D] is multiplied by the objective's scale, and has unit vectors if the objective normalises. labels
    [N, T] are int64, with -1 as padding; label_weights y [N, T] are 0 on padding; mass [N] is the sum of all weights of
    a row. spread [N] times u_v is the weight that label smoothing gives to class v; None without label smoothing.
    """

    hidden: Tensor
    labels: Tensor
    label_weights: Tensor
    mass: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of a sampled loss, shared by the batch; ids ascend.

    class_ids [C]; log_weight [C] and log_weight_after_hit [C] as in `correction.Folded`; label_log_weight [N, T] is
    -log Q of the true columns. hit_ids [C] and label_hit_ids [N, T] (padding negative) are compared instead of class
    ids to find accidental hits; if they are None, class ids are compared.
    """

    class_ids: Tensor
    log_weight: Tensor
    log_weight_after_hit: Tensor | None
    label_log_weight: Tensor
    hit_ids: Tensor | None = None
    label_hit_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowCandidates:
    """Own candidates for each row: class_ids [N, S], log_weight [N, S] (-inf: removed), label_log_weight [N, T]."""

    class_ids: Tensor
    log_weight: Tensor
    label_log_weight: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Part:
    """One planned, self-contained batch; candidates None means every class.

    class_weights u [V] are the weights of label smoothing, or None if all are 1. distribution names the label
    distribution whose gradient every shard has collected for its own rows (`ShardTable.add_labels_`), or is "".
    """

    batch: Batch
    candidates: Candidates | RowCandidates | None
    objective: Objective = field(default_factory=Objective)
    class_weights: Tensor | None = None
    distribution: str = ""

    @property
    def is_full(self) -> bool:
        """True if every class is a column."""
        return self.candidates is None

    @property
    def has_columns_apart(self) -> bool:
        """True if true labels have columns of their own next to the candidates; else they are among all classes."""
        return self.candidates is not None or self.objective.margin is not None


@dataclass(frozen=True, slots=True)
class Score:
    """The answer of a shard, or of a run of shards, to a part; spread is None without label smoothing."""

    statistics: Statistics
    target: Target
    spread: Spread | None
    version: int
    shards: range


@dataclass(frozen=True, slots=True)
class LabelTarget:
    """One shard's share of a piece of a label distribution: its target, and mass [N] float64, the sum of its y."""

    target: Target
    mass: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class Mined:
    """The best candidates of each row by descending logit, then ascending id; each tensor is [N, <= k].

    logits are corrected; log_weight is the candidate's log weight in its row, -inf if it is an accidental hit.
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
    """Inputs of the table's gradient in addition to a part: lse [N] float64 and g [N] (already scaled)."""

    lse: Tensor
    g: Tensor


@dataclass(frozen=True, slots=True)
class StepKey:
    """The identity of a step, which is applied exactly once. digest distinguishes payloads."""

    session: str
    step: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One optimizer step: the self-contained input of `ShardTable.apply_`. upstreams[i] belongs to parts[i]."""

    version: int
    key: StepKey
    learning_rate: float
    staleness: int
    parts: tuple[Part, ...]
    upstreams: tuple[Upstream, ...]


@dataclass(frozen=True, slots=True)
class RowWrite:
    """Rows to overwrite as one version: class_ids [M] distinct, rows [M, D], biases [M] or None (unchanged).

    weight_state and bias_state contain the states [M, W] to overwrite, by name. Other states are unchanged, and so is
    num_commits if it is None.
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
    """Rows read at one version, in the requested order: rows [M, D] in storage dtype, biases [M].

    weight_state and bias_state contain the states [M, W] by name, if requested; num_commits is that of the version.
    """

    class_ids: Tensor
    rows: Tensor
    biases: Tensor
    version: int
    num_commits: int
    weight_state: State = field(default_factory=dict)
    bias_state: State = field(default_factory=dict)
