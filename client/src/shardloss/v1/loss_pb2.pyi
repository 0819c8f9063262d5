from shardloss.v1 import cost_pb2 as _cost_pb2
from shardloss.v1 import logits_pb2 as _logits_pb2
from shardloss.v1 import options_pb2 as _options_pb2
from shardloss.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HitRemoval(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HIT_REMOVAL_UNSPECIFIED: _ClassVar[HitRemoval]
    HIT_REMOVAL_EVERY: _ClassVar[HitRemoval]
    HIT_REMOVAL_LAST: _ClassVar[HitRemoval]
HIT_REMOVAL_UNSPECIFIED: HitRemoval
HIT_REMOVAL_EVERY: HitRemoval
HIT_REMOVAL_LAST: HitRemoval

class Sampler(_message.Message):
    __slots__ = ("kind", "num_sampled", "unique", "seed", "distortion", "num_reserved_ids", "mixture")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Sampler.Kind]
        KIND_LOG_UNIFORM: _ClassVar[Sampler.Kind]
        KIND_UNIFORM: _ClassVar[Sampler.Kind]
        KIND_FIXED_UNIGRAM: _ClassVar[Sampler.Kind]
        KIND_LEARNED_UNIGRAM: _ClassVar[Sampler.Kind]
        KIND_ALL: _ClassVar[Sampler.Kind]
        KIND_MIXTURE: _ClassVar[Sampler.Kind]
    KIND_UNSPECIFIED: Sampler.Kind
    KIND_LOG_UNIFORM: Sampler.Kind
    KIND_UNIFORM: Sampler.Kind
    KIND_FIXED_UNIGRAM: Sampler.Kind
    KIND_LEARNED_UNIGRAM: Sampler.Kind
    KIND_ALL: Sampler.Kind
    KIND_MIXTURE: Sampler.Kind
    class Mixture(_message.Message):
        __slots__ = ("first", "second", "share")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        SECOND_FIELD_NUMBER: _ClassVar[int]
        SHARE_FIELD_NUMBER: _ClassVar[int]
        first: Sampler
        second: Sampler
        share: float
        def __init__(self, first: _Optional[_Union[Sampler, _Mapping]] = ..., second: _Optional[_Union[Sampler, _Mapping]] = ..., share: _Optional[float] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DISTORTION_FIELD_NUMBER: _ClassVar[int]
    NUM_RESERVED_IDS_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    kind: Sampler.Kind
    num_sampled: int
    unique: bool
    seed: int
    distortion: float
    num_reserved_ids: int
    mixture: Sampler.Mixture
    def __init__(self, kind: _Optional[_Union[Sampler.Kind, str]] = ..., num_sampled: _Optional[int] = ..., unique: bool = ..., seed: _Optional[int] = ..., distortion: _Optional[float] = ..., num_reserved_ids: _Optional[int] = ..., mixture: _Optional[_Union[Sampler.Mixture, _Mapping]] = ...) -> None: ...

class SampledValues(_message.Message):
    __slots__ = ("sampled", "true_expected_count", "sampled_expected_count")
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TRUE_EXPECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_EXPECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    sampled: _tensor_pb2.Tensor
    true_expected_count: _tensor_pb2.Tensor
    sampled_expected_count: _tensor_pb2.Tensor
    def __init__(self, sampled: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., true_expected_count: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampled_expected_count: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class InBatch(_message.Message):
    __slots__ = ("correct_log_q",)
    CORRECT_LOG_Q_FIELD_NUMBER: _ClassVar[int]
    correct_log_q: bool
    def __init__(self, correct_log_q: bool = ...) -> None: ...

class PartialFc(_message.Message):
    __slots__ = ("num_sampled", "seed")
    NUM_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    num_sampled: int
    seed: int
    def __init__(self, num_sampled: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class HitIds(_message.Message):
    __slots__ = ("labels", "sampled")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    labels: _tensor_pb2.Tensor
    sampled: _tensor_pb2.Tensor
    def __init__(self, labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampled: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SampledSoftmax(_message.Message):
    __slots__ = ("sampler", "sampled_values", "in_batch", "partial_fc", "remove_accidental_hits", "hit_removal", "num_hard_negatives")
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_VALUES_FIELD_NUMBER: _ClassVar[int]
    IN_BATCH_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FC_FIELD_NUMBER: _ClassVar[int]
    REMOVE_ACCIDENTAL_HITS_FIELD_NUMBER: _ClassVar[int]
    HIT_REMOVAL_FIELD_NUMBER: _ClassVar[int]
    NUM_HARD_NEGATIVES_FIELD_NUMBER: _ClassVar[int]
    sampler: Sampler
    sampled_values: SampledValues
    in_batch: InBatch
    partial_fc: PartialFc
    remove_accidental_hits: bool
    hit_removal: HitRemoval
    num_hard_negatives: int
    def __init__(self, sampler: _Optional[_Union[Sampler, _Mapping]] = ..., sampled_values: _Optional[_Union[SampledValues, _Mapping]] = ..., in_batch: _Optional[_Union[InBatch, _Mapping]] = ..., partial_fc: _Optional[_Union[PartialFc, _Mapping]] = ..., remove_accidental_hits: bool = ..., hit_removal: _Optional[_Union[HitRemoval, str]] = ..., num_hard_negatives: _Optional[int] = ...) -> None: ...

class SampledLogistic(_message.Message):
    __slots__ = ("columns", "subtract_log_q")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SUBTRACT_LOG_Q_FIELD_NUMBER: _ClassVar[int]
    columns: SampledSoftmax
    subtract_log_q: bool
    def __init__(self, columns: _Optional[_Union[SampledSoftmax, _Mapping]] = ..., subtract_log_q: bool = ...) -> None: ...

class FullSigmoid(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Margin(_message.Message):
    __slots__ = ("m1", "m2", "m3")
    M1_FIELD_NUMBER: _ClassVar[int]
    M2_FIELD_NUMBER: _ClassVar[int]
    M3_FIELD_NUMBER: _ClassVar[int]
    m1: float
    m2: float
    m3: float
    def __init__(self, m1: _Optional[float] = ..., m2: _Optional[float] = ..., m3: _Optional[float] = ...) -> None: ...

class FullSoftmax(_message.Message):
    __slots__ = ("label_smoothing", "class_weights", "unit_mass_gradient")
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    CLASS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_MASS_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    label_smoothing: float
    class_weights: _tensor_pb2.Tensor
    unit_mass_gradient: bool
    def __init__(self, label_smoothing: _Optional[float] = ..., class_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., unit_mass_gradient: bool = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "rank", "size", "denominator")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    size: int
    denominator: float
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., size: _Optional[int] = ..., denominator: _Optional[float] = ...) -> None: ...

class ComputeLossRequest(_message.Message):
    __slots__ = ("table", "session", "step", "part", "after_step", "hidden", "labels", "label_weights", "ignore_index", "full_softmax", "sampled_softmax", "sampled_logistic", "full_sigmoid", "upstream", "commit_now", "want_loss", "want_lse", "want_hidden_grad", "want_table_grad", "grad_dtype", "max_staleness", "group", "hit_ids", "logits", "z_loss", "margin", "want_scale_grad", "label_columns", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LABEL_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    FULL_SOFTMAX_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_SOFTMAX_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGISTIC_FIELD_NUMBER: _ClassVar[int]
    FULL_SIGMOID_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    COMMIT_NOW_FIELD_NUMBER: _ClassVar[int]
    WANT_LOSS_FIELD_NUMBER: _ClassVar[int]
    WANT_LSE_FIELD_NUMBER: _ClassVar[int]
    WANT_HIDDEN_GRAD_FIELD_NUMBER: _ClassVar[int]
    WANT_TABLE_GRAD_FIELD_NUMBER: _ClassVar[int]
    GRAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HIT_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    Z_LOSS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    WANT_SCALE_GRAD_FIELD_NUMBER: _ClassVar[int]
    LABEL_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    session: str
    step: int
    part: int
    after_step: int
    hidden: _tensor_pb2.Tensor
    labels: _tensor_pb2.Tensor
    label_weights: _tensor_pb2.Tensor
    ignore_index: int
    full_softmax: FullSoftmax
    sampled_softmax: SampledSoftmax
    sampled_logistic: SampledLogistic
    full_sigmoid: FullSigmoid
    upstream: _tensor_pb2.Tensor
    commit_now: CommitNow
    want_loss: bool
    want_lse: bool
    want_hidden_grad: bool
    want_table_grad: bool
    grad_dtype: _tensor_pb2.DType
    max_staleness: int
    group: Group
    hit_ids: HitIds
    logits: _logits_pb2.LogitTransform
    z_loss: float
    margin: Margin
    want_scale_grad: bool
    label_columns: bool
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., session: _Optional[str] = ..., step: _Optional[int] = ..., part: _Optional[int] = ..., after_step: _Optional[int] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., label_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., ignore_index: _Optional[int] = ..., full_softmax: _Optional[_Union[FullSoftmax, _Mapping]] = ..., sampled_softmax: _Optional[_Union[SampledSoftmax, _Mapping]] = ..., sampled_logistic: _Optional[_Union[SampledLogistic, _Mapping]] = ..., full_sigmoid: _Optional[_Union[FullSigmoid, _Mapping]] = ..., upstream: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., commit_now: _Optional[_Union[CommitNow, _Mapping]] = ..., want_loss: bool = ..., want_lse: bool = ..., want_hidden_grad: bool = ..., want_table_grad: bool = ..., grad_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., max_staleness: _Optional[int] = ..., group: _Optional[_Union[Group, _Mapping]] = ..., hit_ids: _Optional[_Union[HitIds, _Mapping]] = ..., logits: _Optional[_Union[_logits_pb2.LogitTransform, _Mapping]] = ..., z_loss: _Optional[float] = ..., margin: _Optional[_Union[Margin, _Mapping]] = ..., want_scale_grad: bool = ..., label_columns: bool = ..., want_cost: bool = ...) -> None: ...

class CommitNow(_message.Message):
    __slots__ = ("learning_rate", "grad_scale", "opened_at_version")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    OPENED_AT_VERSION_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    grad_scale: float
    opened_at_version: int
    def __init__(self, learning_rate: _Optional[float] = ..., grad_scale: _Optional[float] = ..., opened_at_version: _Optional[int] = ...) -> None: ...

class TableGradient(_message.Message):
    __slots__ = ("class_ids", "rows", "biases")
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    class_ids: _tensor_pb2.Tensor
    rows: _tensor_pb2.Tensor
    biases: _tensor_pb2.Tensor
    def __init__(self, class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., biases: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("queue_us", "score_us", "num_candidates")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    SCORE_US_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    score_us: int
    num_candidates: int
    def __init__(self, queue_us: _Optional[int] = ..., score_us: _Optional[int] = ..., num_candidates: _Optional[int] = ...) -> None: ...

class ComputeLossResponse(_message.Message):
    __slots__ = ("loss", "lse", "hidden_grad", "table_grad", "ticket", "version", "staleness", "replayed", "cost", "committed", "scale_grad", "call_cost")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_GRAD_FIELD_NUMBER: _ClassVar[int]
    TABLE_GRAD_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SCALE_GRAD_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    loss: _tensor_pb2.Tensor
    lse: _tensor_pb2.Tensor
    hidden_grad: _tensor_pb2.Tensor
    table_grad: TableGradient
    ticket: str
    version: int
    staleness: int
    replayed: bool
    cost: Cost
    committed: CommitResponse
    scale_grad: _tensor_pb2.Tensor
    call_cost: _cost_pb2.CallCost
    def __init__(self, loss: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., lse: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., hidden_grad: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., table_grad: _Optional[_Union[TableGradient, _Mapping]] = ..., ticket: _Optional[str] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., replayed: bool = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., committed: _Optional[_Union[CommitResponse, _Mapping]] = ..., scale_grad: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...

class StreamLossRequest(_message.Message):
    __slots__ = ("header", "chunk", "columns")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    header: ComputeLossRequest
    chunk: _tensor_pb2.Chunk
    columns: LabelColumns
    def __init__(self, header: _Optional[_Union[ComputeLossRequest, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., columns: _Optional[_Union[LabelColumns, _Mapping]] = ...) -> None: ...

class LabelColumns(_message.Message):
    __slots__ = ("first_class", "weights", "last")
    FIRST_CLASS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first_class: int
    weights: _tensor_pb2.Tensor
    last: bool
    def __init__(self, first_class: _Optional[int] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., last: bool = ...) -> None: ...

class StreamLossResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ComputeLossResponse
    chunk: _tensor_pb2.Chunk
    def __init__(self, header: _Optional[_Union[ComputeLossResponse, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ...) -> None: ...

class CommitPart(_message.Message):
    __slots__ = ("ticket", "g")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    G_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    g: _tensor_pb2.Tensor
    def __init__(self, ticket: _Optional[str] = ..., g: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ExternalGradient(_message.Message):
    __slots__ = ("gradient",)
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    gradient: TableGradient
    def __init__(self, gradient: _Optional[_Union[TableGradient, _Mapping]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("table", "session", "step", "parts", "learning_rate", "grad_scale", "max_staleness", "external_gradients", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    session: str
    step: int
    parts: _containers.RepeatedCompositeFieldContainer[CommitPart]
    learning_rate: float
    grad_scale: float
    max_staleness: int
    external_gradients: _containers.RepeatedCompositeFieldContainer[ExternalGradient]
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., session: _Optional[str] = ..., step: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[CommitPart, _Mapping]]] = ..., learning_rate: _Optional[float] = ..., grad_scale: _Optional[float] = ..., max_staleness: _Optional[int] = ..., external_gradients: _Optional[_Iterable[_Union[ExternalGradient, _Mapping]]] = ..., want_cost: bool = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("version", "staleness", "replayed", "call_cost")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    version: int
    staleness: int
    replayed: bool
    call_cost: _cost_pb2.CallCost
    def __init__(self, version: _Optional[int] = ..., staleness: _Optional[int] = ..., replayed: bool = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("table", "session", "step")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    table: str
    session: str
    step: int
    def __init__(self, table: _Optional[str] = ..., session: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("num_aborted",)
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    num_aborted: int
    def __init__(self, num_aborted: _Optional[int] = ...) -> None: ...

class SampleCandidatesRequest(_message.Message):
    __slots__ = ("table", "sampler", "step", "labels")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    table: str
    sampler: Sampler
    step: int
    labels: _tensor_pb2.Tensor
    def __init__(self, table: _Optional[str] = ..., sampler: _Optional[_Union[Sampler, _Mapping]] = ..., step: _Optional[int] = ..., labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SampleCandidatesResponse(_message.Message):
    __slots__ = ("sampled", "true_expected_count", "sampled_expected_count", "num_tries")
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TRUE_EXPECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_EXPECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    NUM_TRIES_FIELD_NUMBER: _ClassVar[int]
    sampled: _tensor_pb2.Tensor
    true_expected_count: _tensor_pb2.Tensor
    sampled_expected_count: _tensor_pb2.Tensor
    num_tries: int
    def __init__(self, sampled: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., true_expected_count: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampled_expected_count: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., num_tries: _Optional[int] = ...) -> None: ...
