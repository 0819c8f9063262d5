from shardloss.v1 import options_pb2 as _options_pb2
from shardloss.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Placement(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLACEMENT_UNSPECIFIED: _ClassVar[Placement]
    PLACEMENT_DIV: _ClassVar[Placement]
    PLACEMENT_MOD: _ClassVar[Placement]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_MEMORY: _ClassVar[Durability]
    DURABILITY_LOG: _ClassVar[Durability]

class TableState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TABLE_STATE_UNSPECIFIED: _ClassVar[TableState]
    TABLE_STATE_READY: _ClassVar[TableState]
    TABLE_STATE_CREATING: _ClassVar[TableState]
    TABLE_STATE_ROWS_LOST: _ClassVar[TableState]
PLACEMENT_UNSPECIFIED: Placement
PLACEMENT_DIV: Placement
PLACEMENT_MOD: Placement
DURABILITY_UNSPECIFIED: Durability
DURABILITY_MEMORY: Durability
DURABILITY_LOG: Durability
TABLE_STATE_UNSPECIFIED: TableState
TABLE_STATE_READY: TableState
TABLE_STATE_CREATING: TableState
TABLE_STATE_ROWS_LOST: TableState

class Initializer(_message.Message):
    __slots__ = ("normal", "uniform", "zeros", "seed")
    class Normal(_message.Message):
        __slots__ = ("stddev",)
        STDDEV_FIELD_NUMBER: _ClassVar[int]
        stddev: float
        def __init__(self, stddev: _Optional[float] = ...) -> None: ...
    class Uniform(_message.Message):
        __slots__ = ("limit",)
        LIMIT_FIELD_NUMBER: _ClassVar[int]
        limit: float
        def __init__(self, limit: _Optional[float] = ...) -> None: ...
    class Zeros(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    NORMAL_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    normal: Initializer.Normal
    uniform: Initializer.Uniform
    zeros: Initializer.Zeros
    seed: int
    def __init__(self, normal: _Optional[_Union[Initializer.Normal, _Mapping]] = ..., uniform: _Optional[_Union[Initializer.Uniform, _Mapping]] = ..., zeros: _Optional[_Union[Initializer.Zeros, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("sgd", "adagrad", "row_adagrad", "adam", "adamw", "sparse_adam")
    class Sgd(_message.Message):
        __slots__ = ("momentum", "weight_decay", "nesterov")
        MOMENTUM_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
        NESTEROV_FIELD_NUMBER: _ClassVar[int]
        momentum: float
        weight_decay: float
        nesterov: bool
        def __init__(self, momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ..., nesterov: bool = ...) -> None: ...
    class Adagrad(_message.Message):
        __slots__ = ("initial_accumulator_value", "eps")
        INITIAL_ACCUMULATOR_VALUE_FIELD_NUMBER: _ClassVar[int]
        EPS_FIELD_NUMBER: _ClassVar[int]
        initial_accumulator_value: float
        eps: float
        def __init__(self, initial_accumulator_value: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...
    class RowAdagrad(_message.Message):
        __slots__ = ("initial_accumulator_value", "eps")
        INITIAL_ACCUMULATOR_VALUE_FIELD_NUMBER: _ClassVar[int]
        EPS_FIELD_NUMBER: _ClassVar[int]
        initial_accumulator_value: float
        eps: float
        def __init__(self, initial_accumulator_value: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...
    class Adam(_message.Message):
        __slots__ = ("beta1", "beta2", "eps", "weight_decay")
        BETA1_FIELD_NUMBER: _ClassVar[int]
        BETA2_FIELD_NUMBER: _ClassVar[int]
        EPS_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
        beta1: float
        beta2: float
        eps: float
        weight_decay: float
        def __init__(self, beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...
    class AdamW(_message.Message):
        __slots__ = ("beta1", "beta2", "eps", "weight_decay")
        BETA1_FIELD_NUMBER: _ClassVar[int]
        BETA2_FIELD_NUMBER: _ClassVar[int]
        EPS_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
        beta1: float
        beta2: float
        eps: float
        weight_decay: float
        def __init__(self, beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...
    class SparseAdam(_message.Message):
        __slots__ = ("beta1", "beta2", "eps")
        BETA1_FIELD_NUMBER: _ClassVar[int]
        BETA2_FIELD_NUMBER: _ClassVar[int]
        EPS_FIELD_NUMBER: _ClassVar[int]
        beta1: float
        beta2: float
        eps: float
        def __init__(self, beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...
    SGD_FIELD_NUMBER: _ClassVar[int]
    ADAGRAD_FIELD_NUMBER: _ClassVar[int]
    ROW_ADAGRAD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    ADAMW_FIELD_NUMBER: _ClassVar[int]
    SPARSE_ADAM_FIELD_NUMBER: _ClassVar[int]
    sgd: Optimizer.Sgd
    adagrad: Optimizer.Adagrad
    row_adagrad: Optimizer.RowAdagrad
    adam: Optimizer.Adam
    adamw: Optimizer.AdamW
    sparse_adam: Optimizer.SparseAdam
    def __init__(self, sgd: _Optional[_Union[Optimizer.Sgd, _Mapping]] = ..., adagrad: _Optional[_Union[Optimizer.Adagrad, _Mapping]] = ..., row_adagrad: _Optional[_Union[Optimizer.RowAdagrad, _Mapping]] = ..., adam: _Optional[_Union[Optimizer.Adam, _Mapping]] = ..., adamw: _Optional[_Union[Optimizer.AdamW, _Mapping]] = ..., sparse_adam: _Optional[_Union[Optimizer.SparseAdam, _Mapping]] = ...) -> None: ...

class TableLimits(_message.Message):
    __slots__ = ("max_staleness", "max_sessions")
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    max_staleness: int
    max_sessions: int
    def __init__(self, max_staleness: _Optional[int] = ..., max_sessions: _Optional[int] = ...) -> None: ...

class TableSpec(_message.Message):
    __slots__ = ("name", "num_classes", "dim", "dtype", "bias", "num_shards", "placement", "initializer", "optimizer", "durability", "limits", "count_labels")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    INITIALIZER_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    COUNT_LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_classes: int
    dim: int
    dtype: _tensor_pb2.DType
    bias: bool
    num_shards: int
    placement: Placement
    initializer: Initializer
    optimizer: Optimizer
    durability: Durability
    limits: TableLimits
    count_labels: bool
    def __init__(self, name: _Optional[str] = ..., num_classes: _Optional[int] = ..., dim: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., bias: bool = ..., num_shards: _Optional[int] = ..., placement: _Optional[_Union[Placement, str]] = ..., initializer: _Optional[_Union[Initializer, _Mapping]] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., limits: _Optional[_Union[TableLimits, _Mapping]] = ..., count_labels: bool = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("spec", "version", "num_commits", "num_open_tickets", "reference", "state", "filled")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_TICKETS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    spec: TableSpec
    version: int
    num_commits: int
    num_open_tickets: int
    reference: str
    state: TableState
    filled: float
    def __init__(self, spec: _Optional[_Union[TableSpec, _Mapping]] = ..., version: _Optional[int] = ..., num_commits: _Optional[int] = ..., num_open_tickets: _Optional[int] = ..., reference: _Optional[str] = ..., state: _Optional[_Union[TableState, str]] = ..., filled: _Optional[float] = ...) -> None: ...

class CreateTableRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: TableSpec
    def __init__(self, spec: _Optional[_Union[TableSpec, _Mapping]] = ...) -> None: ...

class CreateTableResponse(_message.Message):
    __slots__ = ("table", "created")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    table: Table
    created: bool
    def __init__(self, table: _Optional[_Union[Table, _Mapping]] = ..., created: bool = ...) -> None: ...

class GetTableRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("tables",)
    TABLES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[Table]
    def __init__(self, tables: _Optional[_Iterable[_Union[Table, _Mapping]]] = ...) -> None: ...

class DeleteTableRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class DeleteTableResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenameTableRequest(_message.Message):
    __slots__ = ("table", "new_name", "replace")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    NEW_NAME_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    table: str
    new_name: str
    replace: bool
    def __init__(self, table: _Optional[str] = ..., new_name: _Optional[str] = ..., replace: bool = ...) -> None: ...

class RenameTableResponse(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: Table
    def __init__(self, table: _Optional[_Union[Table, _Mapping]] = ...) -> None: ...

class RowState(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _tensor_pb2.Tensor
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ReadRowsRequest(_message.Message):
    __slots__ = ("table", "class_ids", "want_state")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    WANT_STATE_FIELD_NUMBER: _ClassVar[int]
    table: str
    class_ids: _tensor_pb2.Tensor
    want_state: bool
    def __init__(self, table: _Optional[str] = ..., class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., want_state: bool = ...) -> None: ...

class ReadRowsResponse(_message.Message):
    __slots__ = ("rows", "biases", "version", "weight_state", "bias_state", "num_commits")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STATE_FIELD_NUMBER: _ClassVar[int]
    BIAS_STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITS_FIELD_NUMBER: _ClassVar[int]
    rows: _tensor_pb2.Tensor
    biases: _tensor_pb2.Tensor
    version: int
    weight_state: _containers.RepeatedCompositeFieldContainer[RowState]
    bias_state: _containers.RepeatedCompositeFieldContainer[RowState]
    num_commits: int
    def __init__(self, rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., biases: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., weight_state: _Optional[_Iterable[_Union[RowState, _Mapping]]] = ..., bias_state: _Optional[_Iterable[_Union[RowState, _Mapping]]] = ..., num_commits: _Optional[int] = ...) -> None: ...

class WriteRowsRequest(_message.Message):
    __slots__ = ("table", "class_ids", "rows", "biases", "weight_state", "bias_state", "num_commits")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STATE_FIELD_NUMBER: _ClassVar[int]
    BIAS_STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITS_FIELD_NUMBER: _ClassVar[int]
    table: str
    class_ids: _tensor_pb2.Tensor
    rows: _tensor_pb2.Tensor
    biases: _tensor_pb2.Tensor
    weight_state: _containers.RepeatedCompositeFieldContainer[RowState]
    bias_state: _containers.RepeatedCompositeFieldContainer[RowState]
    num_commits: int
    def __init__(self, table: _Optional[str] = ..., class_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., biases: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight_state: _Optional[_Iterable[_Union[RowState, _Mapping]]] = ..., bias_state: _Optional[_Iterable[_Union[RowState, _Mapping]]] = ..., num_commits: _Optional[int] = ...) -> None: ...

class WriteRowsResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class WriteClassCountsRequest(_message.Message):
    __slots__ = ("table", "first_class", "counts", "learned")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_CLASS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    table: str
    first_class: int
    counts: _tensor_pb2.Tensor
    learned: _tensor_pb2.Tensor
    def __init__(self, table: _Optional[str] = ..., first_class: _Optional[int] = ..., counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., learned: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class WriteClassCountsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadClassCountsRequest(_message.Message):
    __slots__ = ("table", "first_class", "num_classes")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    table: str
    first_class: int
    num_classes: int
    def __init__(self, table: _Optional[str] = ..., first_class: _Optional[int] = ..., num_classes: _Optional[int] = ...) -> None: ...

class ReadClassCountsResponse(_message.Message):
    __slots__ = ("counts", "learned", "version")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    counts: _tensor_pb2.Tensor
    learned: _tensor_pb2.Tensor
    version: int
    def __init__(self, counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., learned: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...
