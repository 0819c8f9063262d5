"""Requests and replies of the front end, as values: protobuf ends at the rpc room."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardloss_server.shard.record import RowGradient


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """What to draw: kind as in `numerics.sampler.DISTRIBUTIONS`."""

    kind: str
    num_sampled: int
    unique: bool
    seed: int


@dataclass(frozen=True, slots=True)
class SampledValues:
    """The caller's draw: sampled [S], true_expected_count [N, T], sampled_expected_count [S]."""

    sampled: Tensor
    true_expected_count: Tensor
    sampled_expected_count: Tensor


@dataclass(frozen=True, slots=True)
class SampledSoftmax:
    """hit_removal is "none", "every" or "last"."""

    candidates: SamplerSpec | SampledValues
    hit_removal: str


@dataclass(frozen=True, slots=True)
class CommitNow:
    """The one-call form: commit the part at once. opened_at_version tells a new session from a forgotten one."""

    learning_rate: float
    grad_scale: float
    opened_at_version: int


@dataclass(frozen=True, slots=True)
class Want:
    """What a reply must hold; grad_dtype is the hidden gradient's dtype, or None for the compute dtype."""

    loss: bool = True
    lse: bool = False
    hidden_grad: bool = False
    table_grad: bool = False
    grad_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class LossRequest:
    """One ComputeLoss. hidden [N, D] any float dtype; labels [N, T] int64; sampled None is the full softmax.

    digest tells one payload under a key from another; it is empty where there is no session. max_reply_bytes is what
    the tensors of the reply may take.
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
    """The version a step made and its staleness."""

    version: int
    staleness: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of queueing and scoring; candidates scored."""

    queue_us: int
    score_us: int
    num_candidates: int


@dataclass(frozen=True, slots=True)
class LossReply:
    """The answer to a LossRequest; None where not wanted. ticket is "" where none is open."""

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

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        tensors = [self.loss, self.lse, self.hidden_grad]
        if self.table_grad is not None:
            tensors += [self.table_grad.class_ids, self.table_grad.rows, self.table_grad.biases]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
