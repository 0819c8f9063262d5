"""Public values: what a table is made of, what a loss is, what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardloss.cost import CallCost as CallCost  # noqa: PLC0414  (a public value like those below)
from shardloss.evaluation import Evaluation as Evaluation  # noqa: PLC0414
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


def state_widths(optimizer: Optimizer, dim: int) -> dict[str, int]:
    """Numbers that an optimizer's state holds a row of dim D, by name, ascending; of a bias, with dim 1."""
    if isinstance(optimizer, Sgd):
        return {"momentum": dim} if optimizer.momentum else {}
    if isinstance(optimizer, (Adagrad, RowAdagrad)):
        return {"sum": dim if isinstance(optimizer, Adagrad) else 1}
    return {"first_moment": dim, "second_moment": dim}


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

# Logits.


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """z = cap(scale * (hidden . row + bias)), where cap(x) = soft_cap * tanh(x / soft_cap); soft_cap None is no cap.

    scale is 1 / temperature; normalize divides hidden and rows by their norms first: hidden . row is their cosine.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    normalize: bool = False


@dataclass(frozen=True, slots=True)
class Margin:
    """cos(theta) of the true class becomes cos(m1 theta + m2) - m3: m2 is ArcFace's, m3 CosFace's, m1 SphereFace's."""

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0


# Candidates of sampled losses.


@dataclass(frozen=True, slots=True)
class FixedUnigram:
    """p(k) ~ count(k) ** distortion, of the counts of `Table.write_class_counts`; 0 for the reserved first ids."""

    distortion: float = 1.0
    num_reserved_ids: int = 0


@dataclass(frozen=True, slots=True)
class Mixture:
    """p(k) = share * first(k) + (1 - share) * second(k)."""

    first: str | FixedUnigram
    second: str | FixedUnigram
    share: float


@dataclass(frozen=True, slots=True)
class InBatch:
    """The labels of the batch's other rows, T = 1.

    correct_log_q: by how often commits have seen each class; the table needs count_labels. The row's own label was not
    drawn and is not corrected (arXiv:2507.09331).
    """

    correct_log_q: bool = False


@dataclass(frozen=True, slots=True)
class PartialFc:
    """Every label of the batch and uniform distinct negatives, num_sampled in all; logits are not corrected."""


Sampler: TypeAlias = str | FixedUnigram | Mixture | InBatch | PartialFc


@dataclass(frozen=True, slots=True)
class SampledValues:
    """The caller's draw: sampled [S], or [N, S] each row's own; Q of the true classes [N, T] and of sampled."""

    sampled: Array
    true_expected_count: Array
    sampled_expected_count: Array


@dataclass(frozen=True, slots=True)
class HitIds:
    """What is compared to find accidental hits in place of class ids: labels [N, T], sampled as the draw.

    sampled is None with `InBatch`.
    """

    labels: Array
    sampled: Array | None = None


# Losses. docs/losses.md says which options combine.


@dataclass(frozen=True, slots=True)
class FullSoftmax:
    """Softmax over all classes.

    label_smoothing and class_weights [V] are those of torch.nn.functional.cross_entropy. z_loss adds
    z_loss * lse ** 2. A margin is for a table without biases and one label a row. With unit_mass_gradient gradients
    take label weights for a distribution whatever their sum, as TensorFlow's and Paddle's losses of soft labels do.
    """

    label_smoothing: float = 0.0
    class_weights: Array | None = None
    margin: Margin | None = None
    z_loss: float = 0.0
    logits: LogitTransform = LogitTransform()
    unit_mass_gradient: bool = False


@dataclass(frozen=True, slots=True)
class SampledSoftmax:
    """Sampled softmax with logits corrected by -log Q.

    num_sampled S candidates a step by `sampler` ("log_uniform", "uniform", "fixed_unigram", "learned_unigram", "all", a
    FixedUnigram, Mixture, InBatch or PartialFc), distinct where unique, drawn by (seed, step); or the caller's own
    sampled_values. hit_removal says which copies of an accidental hit go where remove_accidental_hits: "every", or
    "last" as TensorFlow does; hits are found by class ids or by hit_ids. num_hard_negatives > 0 keeps so many of the
    best candidates of each row alone.
    """

    num_sampled: int = 0
    sampler: Sampler = "log_uniform"
    unique: bool = True
    seed: int = 0
    sampled_values: SampledValues | None = None
    remove_accidental_hits: bool = True
    hit_removal: str = "every"
    hit_ids: HitIds | None = None
    num_hard_negatives: int = 0
    margin: Margin | None = None
    z_loss: float = 0.0
    logits: LogitTransform = LogitTransform()


@dataclass(frozen=True, slots=True)
class SampledLogistic:
    """Logistic loss over the true classes (target 1/T each) and the candidates (target 0): TensorFlow's nce_loss.

    Candidates as in `SampledSoftmax`. With remove_accidental_hits it is the sampled logistic loss; without
    subtract_log_q it is negative sampling.
    """

    num_sampled: int = 0
    sampler: Sampler = "log_uniform"
    unique: bool = True
    seed: int = 0
    sampled_values: SampledValues | None = None
    remove_accidental_hits: bool = False
    hit_removal: str = "every"
    hit_ids: HitIds | None = None
    subtract_log_q: bool = True
    logits: LogitTransform = LogitTransform()


@dataclass(frozen=True, slots=True)
class FullSigmoid:
    """Logistic loss over all classes: labels have target 1 (or their weight), all others 0."""

    logits: LogitTransform = LogitTransform()


Loss: TypeAlias = FullSoftmax | SampledSoftmax | SampledLogistic | FullSigmoid


# Answers. Their cost is None unless the call asks for it by want_cost.


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
    count_labels: bool
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
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class LossResult:
    """One batch's answer; None where not asked for.

    loss [N] and lse [N]; hidden_grad [N, D] = d loss[n] / d hidden[n], not scaled by an upstream gradient, and
    scale_grad [N] = d loss[n] / d scale alike. ticket names the part in a commit; "" where none is open.
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
    scale_grad: Array | None = None
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class TopK:
    """The k best classes of each row: class_ids [N, k], logits [N, k], log_probs [N, k] or None."""

    class_ids: Array
    logits: Array
    log_probs: Array | None
    version: int
    last_version: int
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """logits [N, S] of asked classes, log_probs [N, S] or None."""

    logits: Array
    log_probs: Array | None
    version: int
    last_version: int
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class ClassSamples:
    """Draws from the exact softmax: class_ids [N, S] in drawing order, log_probs [N, S] or None."""

    class_ids: Array
    log_probs: Array | None
    version: int
    last_version: int
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """rows [M, D] (bfloat16 widened to float32) and biases [M] or None; version is that of the last page read."""

    rows: Array
    biases: Array | None
    version: int


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows with all their state, as the table stores them; what is read of many pages is of one version.

    rows [M, D] (uint16 holds the bits of bfloat16), biases [M] or None; state [M, W] by name of rows, and of biases
    (W = 1). num_commits is the optimizer's step.
    """

    rows: Array
    biases: Array | None
    weight_state: Mapping[str, Array]
    bias_state: Mapping[str, Array]
    version: int
    num_commits: int


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Counts of a range of classes: written [M] or None where none were, learned [M] or None where none are kept."""

    written: Array | None
    learned: Array | None
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
