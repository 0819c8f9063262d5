"""Public values: the options of a table, the losses, and the results of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardloss.cost import CallCost as CallCost  # noqa: PLC0414  (a public value like those below)
from shardloss.evaluation import Evaluation as Evaluation  # noqa: PLC0414
from shardloss.evaluation import EvaluationSummary as EvaluationSummary  # noqa: PLC0414
from shardloss.evaluation import SamplingGap as SamplingGap  # noqa: PLC0414
from shardloss.wire import Array

# Optimizers of a table. Each step has its learning rate. Formulas and lazy semantics: docs/optimizers.md.


@dataclass(frozen=True, slots=True)
class Sgd:
    """torch.optim.SGD on touched rows; a momentum buffer is kept only if momentum > 0."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, slots=True)
class Adagrad:
    """torch.optim.Adagrad on touched rows, with one accumulator per element."""

    initial_accumulator_value: float = 0.0
    eps: float = 1e-10


@dataclass(frozen=True, slots=True)
class RowAdagrad:
    """Adagrad with one accumulator per row, which sums the row's mean squared gradients."""

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
    """Return the width of each state of an optimizer for a row of dim D (a bias: dim 1), ordered by name."""
    if isinstance(optimizer, Sgd):
        return {"momentum": dim} if optimizer.momentum else {}
    if isinstance(optimizer, (Adagrad, RowAdagrad)):
        return {"sum": dim if isinstance(optimizer, Adagrad) else 1}
    return {"first_moment": dim, "second_moment": dim}


# Initial values of rows, which are functions of (seed, class id).


@dataclass(frozen=True, slots=True)
class Normal:
    """Initial values from a normal distribution with mean 0."""

    stddev: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Uniform:
    """Initial values from a uniform distribution on [-limit, limit)."""

    limit: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Zeros:
    """Initial values of zero."""

    seed: int = 0


Initializer: TypeAlias = Normal | Uniform | Zeros

# Logits.


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The logit z = cap(scale * (hidden . row + bias)), with cap(x) = soft_cap * tanh(x / soft_cap).

    soft_cap None is no cap. scale is 1 / temperature. normalize first divides hidden and rows by their norms, so that
    hidden . row is their cosine.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    normalize: bool = False


@dataclass(frozen=True, slots=True)
class Margin:
    """A margin that turns cos(theta) of the true class into cos(m1 theta + m2) - m3.

    m1 is SphereFace's margin, m2 ArcFace's and m3 CosFace's.
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0


# Candidates of sampled losses.


@dataclass(frozen=True, slots=True)
class FixedUnigram:
    """A sampler with p(k) ~ count(k) ** distortion, and p(k) = 0 for the first num_reserved_ids ids.

    The counts are those of `Table.write_class_counts`.
    """

    distortion: float = 1.0
    num_reserved_ids: int = 0


@dataclass(frozen=True, slots=True)
class Mixture:
    """A sampler with p(k) = share * first(k) + (1 - share) * second(k)."""

    first: str | FixedUnigram
    second: str | FixedUnigram
    share: float


@dataclass(frozen=True, slots=True)
class InBatch:
    """Candidates that are the labels of the other rows of the batch; T = 1.

    correct_log_q corrects logits by the frequency of each class in commits, which the table counts if it was created
    with count_labels. The row's own label was not drawn and is not corrected (arXiv:2507.09331).
    """

    correct_log_q: bool = False


@dataclass(frozen=True, slots=True)
class PartialFc:
    """Candidates that are all labels of the batch and distinct uniform negatives, num_sampled in total.

    Logits are not corrected.
    """


Sampler: TypeAlias = str | FixedUnigram | Mixture | InBatch | PartialFc


@dataclass(frozen=True, slots=True)
class SampledValues:
    """The caller's own draw: sampled [S], or [N, S] per row, and Q of the true classes [N, T] and of sampled."""

    sampled: Array
    true_expected_count: Array
    sampled_expected_count: Array


@dataclass(frozen=True, slots=True)
class HitIds:
    """The ids that are compared, in place of class ids, to find accidental hits.

    labels is [N, T]; sampled has the shape of the draw, and is None with `InBatch`.
    """

    labels: Array
    sampled: Array | None = None


# Losses. docs/losses.md says which options combine.


@dataclass(frozen=True, slots=True)
class FullSoftmax:
    """Softmax over all classes.

    label_smoothing and class_weights [V] are those of torch.nn.functional.cross_entropy. z_loss adds
    z_loss * lse ** 2. A margin requires a table without biases and one label per row. With unit_mass_gradient,
    gradients treat label weights as a distribution whatever their sum, as TensorFlow's and Paddle's losses of soft
    labels do.
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

    Each step draws num_sampled S candidates from `sampler` ("log_uniform", "uniform", "fixed_unigram",
    "learned_unigram", "all", a FixedUnigram, Mixture, InBatch or PartialFc), without repeats if unique, keyed by
    (seed, step); sampled_values replaces the draw by the caller's own. With remove_accidental_hits, hit_removal selects
    which copies of a hit are removed: "every", or "last" as in TensorFlow. Hits are found by class id or by hit_ids.
    num_hard_negatives > 0 keeps only that many of the best candidates of each row.
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

    Candidates are as in `SampledSoftmax`. With remove_accidental_hits it is the sampled logistic loss; without
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
    """Logistic loss over all classes: labels have target 1 (or their weight), all others 0.

    A class counts once, however often a row lists it. Weights of one class in a row add up, to at most 1.
    """

    logits: LogitTransform = LogitTransform()


Loss: TypeAlias = FullSoftmax | SampledSoftmax | SampledLogistic | FullSigmoid


# Results. cost is None unless the call requests it by want_cost.


@dataclass(frozen=True, slots=True)
class TableInfo:
    """The spec of a table with every default filled in, and its current state, version, commits and tickets.

    state is "ready", "creating" (filled is the share of the rows that have their initial values), or "rows_lost": a
    worker died with rows of the table, and all calls that need rows raise `RowsLost`. reference names this very table
    in a request, whatever its name is now; a table created later never has it.
    """

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
    reference: str = ""
    state: str = "ready"
    filled: float = 1.0


@dataclass(frozen=True, slots=True)
class TableGradient:
    """Sparse gradient of a table: class_ids [M] ascending, rows [M, D], biases [M] or None."""

    class_ids: Array
    rows: Array
    biases: Array | None


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The version after a step, the largest staleness of its parts, and whether it had already been applied."""

    version: int
    staleness: int
    replayed: bool
    cost: CallCost | None = None


@dataclass(frozen=True, slots=True)
class LossResult:
    """The result of one batch; a field is None if it was not requested.

    loss and lse are [N]; hidden_grad [N, D] is d loss[n] / d hidden[n] and scale_grad [N] is d loss[n] / d scale, not
    multiplied by an upstream gradient. ticket identifies the part in a commit, and is "" if none is open.
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
    """Scores of the requested classes: logits [N, S], log_probs [N, S] or None."""

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
    """Rows of a table: rows [M, D] (bfloat16 widened to float32) and biases [M] or None; version is the last page's."""

    rows: Array
    biases: Array | None
    version: int


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows with all their state, as the table stores them, at one version.

    rows is [M, D] (uint16 with the bits of bfloat16) and biases [M] or None. weight_state and bias_state map the name
    of a state to its values [M, W], with W = 1 for biases. num_commits is the optimizer's step.
    """

    rows: Array
    biases: Array | None
    weight_state: Mapping[str, Array]
    bias_state: Mapping[str, Array]
    version: int
    num_commits: int


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Counts of a range of classes: written [M], or None if there are none; learned [M], or None if none are kept."""

    written: Array | None
    learned: Array | None
    version: int


@dataclass(frozen=True, slots=True)
class Candidates:
    """Drawn candidates: sampled [S] in drawing order, expected counts [N, T] and [S], and the number of tries."""

    sampled: Array
    true_expected_count: Array
    sampled_expected_count: Array
    num_tries: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Version, features and limits of a server; proto/shardloss/v1/server.proto has the names of the limits."""

    version: str
    features: Sequence[str]
    num_workers: int
    devices: Sequence[str]
    limits: dict[str, float]
