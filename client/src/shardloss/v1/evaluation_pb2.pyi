from shardloss.v1 import cost_pb2 as _cost_pb2
from shardloss.v1 import logits_pb2 as _logits_pb2
from shardloss.v1 import options_pb2 as _options_pb2
from shardloss.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EvaluateRequest(_message.Message):
    __slots__ = ("table", "hidden", "labels", "ignore_index", "want_rank", "want_sigmoid", "logits", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    WANT_RANK_FIELD_NUMBER: _ClassVar[int]
    WANT_SIGMOID_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    hidden: _tensor_pb2.Tensor
    labels: _tensor_pb2.Tensor
    ignore_index: int
    want_rank: bool
    want_sigmoid: bool
    logits: _logits_pb2.LogitTransform
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., ignore_index: _Optional[int] = ..., want_rank: bool = ..., want_sigmoid: bool = ..., logits: _Optional[_Union[_logits_pb2.LogitTransform, _Mapping]] = ..., want_cost: bool = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("loss", "rank", "version", "last_version", "sigmoid", "call_cost")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGMOID_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    loss: _tensor_pb2.Tensor
    rank: _tensor_pb2.Tensor
    version: int
    last_version: int
    sigmoid: _tensor_pb2.Tensor
    call_cost: _cost_pb2.CallCost
    def __init__(self, loss: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rank: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., last_version: _Optional[int] = ..., sigmoid: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...

class TopKRequest(_message.Message):
    __slots__ = ("table", "hidden", "k", "want_log_probs", "logits", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    WANT_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    hidden: _tensor_pb2.Tensor
    k: int
    want_log_probs: bool
    logits: _logits_pb2.LogitTransform
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., k: _Optional[int] = ..., want_log_probs: bool = ..., logits: _Optional[_Union[_logits_pb2.LogitTransform, _Mapping]] = ..., want_cost: bool = ...) -> None: ...

class TopKResponse(_message.Message):
    __slots__ = ("class_ids", "logits", "log_probs", "version", "last_version", "call_cost")
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERSION_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    class_ids: _tensor_pb2.Tensor
    logits: _tensor_pb2.Tensor
    log_probs: _tensor_pb2.Tensor
    version: int
    last_version: int
    call_cost: _cost_pb2.CallCost
    def __init__(self, class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., log_probs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., last_version: _Optional[int] = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("table", "hidden", "class_ids", "want_log_probs", "logits", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    WANT_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    hidden: _tensor_pb2.Tensor
    class_ids: _tensor_pb2.Tensor
    want_log_probs: bool
    logits: _logits_pb2.LogitTransform
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., want_log_probs: bool = ..., logits: _Optional[_Union[_logits_pb2.LogitTransform, _Mapping]] = ..., want_cost: bool = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("logits", "log_probs", "version", "last_version", "call_cost")
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERSION_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    logits: _tensor_pb2.Tensor
    log_probs: _tensor_pb2.Tensor
    version: int
    last_version: int
    call_cost: _cost_pb2.CallCost
    def __init__(self, logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., log_probs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., last_version: _Optional[int] = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...

class SampleClassesRequest(_message.Message):
    __slots__ = ("table", "hidden", "num_samples", "seed", "first_row", "top_k", "want_log_probs", "logits", "want_cost")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    WANT_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    WANT_COST_FIELD_NUMBER: _ClassVar[int]
    table: str
    hidden: _tensor_pb2.Tensor
    num_samples: int
    seed: int
    first_row: int
    top_k: int
    want_log_probs: bool
    logits: _logits_pb2.LogitTransform
    want_cost: bool
    def __init__(self, table: _Optional[str] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., num_samples: _Optional[int] = ..., seed: _Optional[int] = ..., first_row: _Optional[int] = ..., top_k: _Optional[int] = ..., want_log_probs: bool = ..., logits: _Optional[_Union[_logits_pb2.LogitTransform, _Mapping]] = ..., want_cost: bool = ...) -> None: ...

class SampleClassesResponse(_message.Message):
    __slots__ = ("class_ids", "log_probs", "version", "last_version", "call_cost")
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERSION_FIELD_NUMBER: _ClassVar[int]
    CALL_COST_FIELD_NUMBER: _ClassVar[int]
    class_ids: _tensor_pb2.Tensor
    log_probs: _tensor_pb2.Tensor
    version: int
    last_version: int
    call_cost: _cost_pb2.CallCost
    def __init__(self, class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., log_probs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., last_version: _Optional[int] = ..., call_cost: _Optional[_Union[_cost_pb2.CallCost, _Mapping]] = ...) -> None: ...
