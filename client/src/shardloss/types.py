"""Public values: what a table is made of, what a loss is, what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardloss.evaluation import Evaluation as Evaluation  # noqa: PLC0414  (a public value like those below)
from shardloss.evaluation import EvaluationSummary as EvaluationSummary  # noqa: PLC0414
from shardloss.evaluation import SamplingGap as SamplingGap  # noqa: PLC0414
from shardloss.wire import Array

# Optimizers of a table. The learning rate comes with each step. Formulas and lazy semantics: docs/optimizers.md.


@dataclass(frozen=True, slots=True)
class Sgd:
    """torch.optim.SGD on touched rows; a momentum buffer is held only where momentum > 0."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, slots=True)
class Adagrad:
    """torch.optim.Adagrad on touched rows, one accumulator an element."""

    initial_accumulator_value: float = 0.0
    eps: float = 1e-10


@dataclass(frozen=True, slots=True)
class RowAdagrad:
    """Adagrad with one accumulator a row, fed with the row's mean squared gradient."""

    initial_accumulator_value: float = 0.0
    eps: float = 1e-10


@dataclass(frozen=True, slots=True)
class Adam:
    """torch.optim.Adam on touched rows; bias correction counts the table's commits."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class AdamW:
    """torch.optim.AdamW on touched rows."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True, slots=True)
class SparseAdam:
    """torch.optim.SparseAdam: Adam with eps added before the bias correction."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


Optimizer: TypeAlias = Sgd | Adagrad | RowAdagrad | Adam | AdamW | SparseAdam

# First values of rows: functions of (seed, class id).


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with mean 0."""

    stddev: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform on [-limit, limit)."""

    limit: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Zeros:
    """All zeros."""

    seed: int = 0


Initializer: TypeAlias = Normal | Uniform | Zeros

# Losses.


@dataclass(frozen=True, slots=True)
class FullSoftmax:
    """Softmax over all classes."""


@dataclass(frozen=True, slots=True)
class SampledValues:
    """The caller's draw: sampled [S] ids, true_expected_count [N, T], sampled_expected_count [S]."""

    sampled: Array
    true_expected_count: Array
    sampled_expected_count: Array


@dataclass(frozen=True, slots=True)
class SampledSoftmax:
    """Sampled softmax with logits corrected by -log Q.

    num_sampled S candidates a step by `sampler` ("log_uniform" or "uniform"), distinct where unique, drawn by
    (seed, step); or the caller's own sampled_values. hit_removal says which copies of an accidental hit go where
    remove_accidental_hits: "every", or "last" as TensorFlow does.
    """

    num_sampled: int = 0
    sampler: str = "log_uniform"
    unique: bool = True
    seed: int = 0
    sampled_values: SampledValues | None = None
    remove_accidental_hits: bool = True
    hit_removal: str = "every"


Loss: TypeAlias = FullSoftmax | SampledSoftmax


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """How logits are made: z = cap(scale * (hidden . row + bias)), cap(x) = soft_cap * tanh(x / soft_cap) or x.

    scale is 1 / temperature; normalize divides hidden and rows by their norms first, as cosine heads do.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    normalize: bool = False


# Answers.


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table as it stands: its spec with every default filled in, its version and its number of commits."""

    name: str
    num_classes: int
    dim: int
    dtype: str
    bias: bool
    num_shards: int
    placement: str
    initializer: Initializer
    optimizer: Optimizer
    version: int
    num_commits: int
    num_open_tickets: int


@dataclass(frozen=True, slots=True)
class TableGradient:
    """Sparse gradient of a table: class_ids [M] ascending, rows [M, D], biases [M] or None."""

    class_ids: Array
    rows: Array
    biases: Array | None


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The version that a step made, its largest staleness, and whether it had been applied before."""

    version: int
    staleness: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class LossResult:
    """One batch's answer; None where not asked for.

    loss [N] and lse [N]; hidden_grad [N, D] = d loss[n] / d hidden[n], not scaled by an upstream gradient. ticket
    names the part in a commit; "" where none is open.
    """

    loss: Array | None
    lse: Array | None
    hidden_grad: Array | None
    table_grad: TableGradient | None
    ticket: str
    version: int
    replayed: bool
    num_candidates: int
    committed: CommitResult | None


@dataclass(frozen=True, slots=True)
class TopK:
    """The k best classes of each row: class_ids [N, k], logits [N, k], log_probs [N, k] or None."""

    class_ids: Array
    logits: Array
    log_probs: Array | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Scores:
    """logits [N, S] of asked classes, log_probs [N, S] or None."""

    logits: Array
    log_probs: Array | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class ClassSamples:
    """Draws from the exact softmax: class_ids [N, S] in drawing order, log_probs [N, S] or None."""

    class_ids: Array
    log_probs: Array | None
    version: int
    last_version: int


@dataclass(frozen=True, slots=True)
class Rows:
    """rows [M, D] (bfloat16 widened to float32) and biases [M] or None; version is that of the last page read."""

    rows: Array
    biases: Array | None
    version: int


@dataclass(frozen=True, slots=True)
class Candidates:
    """sampled [S] in drawing order, expected counts [N, T] and [S], and the draws it took."""

    sampled: Array
    true_expected_count: Array
    sampled_expected_count: Array
    num_tries: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Version, features and limits of a server; limits by their names in proto/shardloss/v1/server.proto."""

    version: str
    features: Sequence[str]
    num_workers: int
    devices: Sequence[str]
    limits: dict[str, float]
