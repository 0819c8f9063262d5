"""Requests and replies of the front end as plain values; protobuf is used only in the rpc package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from shardloss_server.numerics.objective import Objective
from shardloss_server.shard.record import RowGradient


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """A sampler of kind "log_uniform", "uniform", "fixed_unigram", "learned_unigram", "all" or "mixture".

    distortion and num_reserved_ids apply only to a fixed unigram, and mixture only to a mixture.
    """

    kind: str
    num_sampled: int
    unique: bool
    seed: int
    distortion: float = 1.0
    num_reserved_ids: int = 0
    mixture: Mixture | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of two samplers, p = share * first + (1 - share) * second; only their distributions are used."""

    first: SamplerSpec
    second: SamplerSpec
    share: float


@dataclass(frozen=True, slots=True)
class SampledValues:
    """The caller's draw: sampled [S], or [N, S] with a draw per row; Q of the labels [N, T] and of sampled."""

    sampled: Tensor
    true_expected_count: Tensor
    sampled_expected_count: Tensor


@dataclass(frozen=True, slots=True)
class InBatch:
    """The other rows' labels as candidates; if is_corrected, Q is computed from class frequencies in commits."""

    is_corrected: bool


@dataclass(frozen=True, slots=True)
class PartialFc:
    """Every label of the batch and uniform negatives, num_sampled in total; logits are not corrected."""

    num_sampled: int
    seed: int


@dataclass(frozen=True, slots=True)
class HitIds:
    """The ids compared to find accidental hits: labels [N, T]; sampled in the draw's shape, or None for `InBatch`."""

    labels: Tensor
    sampled: Tensor | None


@dataclass(frozen=True, slots=True)
class SampledSoftmax:
    """The candidates of a sampled loss. hit_removal is "none", "every" or "last".

    If num_hard_negatives > 0, only that many of each row's best candidates are kept. Without is_corrected, log Q is
    left out.
    """

    candidates: SamplerSpec | SampledValues | InBatch | PartialFc
    hit_removal: str
    hit_ids: HitIds | None = None
    num_hard_negatives: int = 0
    is_corrected: bool = True


@dataclass(frozen=True, slots=True)
class LabelColumns:
    """Label weights y [N, C] of classes first_class to first_class + C - 1."""

    first_class: int
    weights: Tensor


@dataclass(frozen=True, slots=True)
class CommitNow:
    """The one-call form: commit the part at once. opened_at_version separates new sessions from forgotten ones."""

    learning_rate: float
    grad_scale: float
    opened_at_version: int


@dataclass(frozen=True, slots=True)
class Want:
    """The results wanted in a reply; grad_dtype is the hidden gradient's dtype, or None for the compute dtype."""

    loss: bool = True
    lse: bool = False
    hidden_grad: bool = False
    table_grad: bool = False
    grad_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class LossRequest:
    """One ComputeLoss: hidden [N, D] of any float dtype, labels [N, T] int64; without sampled, a loss over all classes.

    class_weights [V] apply to the full softmax. label_columns are the labels if these are a distribution over all
    classes, read once as they arrive; T is then 0. digest distinguishes the payloads sent under one key, and is empty
    without a session. max_reply_bytes limits the tensors of the reply.
    """

    table: str
    session: str
    step: int
    part: int
    after_step: int | None
    hidden: Tensor
    labels: Tensor
    label_weights: Tensor | None
    ignore_index: int | None
    sampled: SampledSoftmax | None
    upstream: Tensor | None
    commit_now: CommitNow | None
    want: Want
    digest: bytes
    max_reply_bytes: int
    objective: Objective = field(default_factory=Objective)
    class_weights: Tensor | None = None
    label_columns: Iterable[LabelColumns] | None = None


@dataclass(frozen=True, slots=True)
class CommitPart:
    """One ticket with its upstream gradient g [N], or None for ones."""

    ticket: str
    g: Tensor | None


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """One optimizer step over all parts."""

    table: str
    session: str
    step: int
    parts: tuple[CommitPart, ...]
    learning_rate: float
    grad_scale: float
    max_staleness: int | None
    digest: bytes
    is_one_call: bool = False


@dataclass(frozen=True, slots=True)
class CommitReply:
    """The version that a step created, and its staleness in versions."""

    version: int
    staleness: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a loss: microseconds of queueing and scoring, and the number of candidates scored."""

    queue_us: int
    score_us: int
    num_candidates: int


@dataclass(frozen=True, slots=True)
class LossReply:
    """The answer to a LossRequest; a result that is not wanted is None. ticket is "" if none is open."""

    loss: Tensor | None
    lse: Tensor | None
    hidden_grad: Tensor | None
    table_grad: RowGradient | None
    ticket: str
    version: int
    replayed: bool
    cost: Cost
    committed: CommitReply | None = None
    has_bias: bool = True
    scale_grad: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Total size of the reply's tensors, in bytes."""
        tensors = [self.loss, self.lse, self.hidden_grad, self.scale_grad]
        if self.table_grad is not None:
            tensors += [self.table_grad.class_ids, self.table_grad.rows, self.table_grad.biases]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
