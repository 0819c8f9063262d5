from shardloss.v1 import options_pb2 as _options_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("versions", "uptime_s", "time_s", "num_workers", "workers", "shm_free_bytes", "shm_total_bytes", "tables", "places", "num_refused", "methods")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SHM_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHM_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.ScalarMap[str, str]
    uptime_s: float
    time_s: float
    num_workers: int
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    shm_free_bytes: int
    shm_total_bytes: int
    tables: _containers.RepeatedCompositeFieldContainer[TableStatus]
    places: _containers.RepeatedCompositeFieldContainer[Places]
    num_refused: int
    methods: _containers.RepeatedCompositeFieldContainer[MethodStatus]
    def __init__(self, versions: _Optional[_Mapping[str, str]] = ..., uptime_s: _Optional[float] = ..., time_s: _Optional[float] = ..., num_workers: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., shm_free_bytes: _Optional[int] = ..., shm_total_bytes: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableStatus, _Mapping]]] = ..., places: _Optional[_Iterable[_Union[Places, _Mapping]]] = ..., num_refused: _Optional[int] = ..., methods: _Optional[_Iterable[_Union[MethodStatus, _Mapping]]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("index", "up", "device", "node", "pid", "num_restarts", "resident_bytes", "device_bytes", "kept_bytes", "num_threads", "num_cores", "num_shards", "memory_limit_bytes", "memory_free_bytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    NUM_CORES_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    index: int
    up: bool
    device: str
    node: str
    pid: int
    num_restarts: int
    resident_bytes: int
    device_bytes: int
    kept_bytes: int
    num_threads: int
    num_cores: int
    num_shards: int
    memory_limit_bytes: int
    memory_free_bytes: int
    def __init__(self, index: _Optional[int] = ..., up: bool = ..., device: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., num_restarts: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., num_threads: _Optional[int] = ..., num_cores: _Optional[int] = ..., num_shards: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ...) -> None: ...

class TableStatus(_message.Message):
    __slots__ = ("name", "num_classes", "dim", "dtype", "num_shards", "version", "num_commits", "num_sessions", "num_open_tickets", "num_bytes", "rows_lost", "filled")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_TICKETS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_LOST_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_classes: int
    dim: int
    dtype: str
    num_shards: int
    version: int
    num_commits: int
    num_sessions: int
    num_open_tickets: int
    num_bytes: int
    rows_lost: bool
    filled: float
    def __init__(self, name: _Optional[str] = ..., num_classes: _Optional[int] = ..., dim: _Optional[int] = ..., dtype: _Optional[str] = ..., num_shards: _Optional[int] = ..., version: _Optional[int] = ..., num_commits: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_open_tickets: _Optional[int] = ..., num_bytes: _Optional[int] = ..., rows_lost: bool = ..., filled: _Optional[float] = ...) -> None: ...

class Places(_message.Message):
    __slots__ = ("name", "num_calls", "num_bytes", "max_calls", "max_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_calls: int
    num_bytes: int
    max_calls: int
    max_bytes: int
    def __init__(self, name: _Optional[str] = ..., num_calls: _Optional[int] = ..., num_bytes: _Optional[int] = ..., max_calls: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class MethodStatus(_message.Message):
    __slots__ = ("name", "num_calls", "errors", "rate", "median_s", "p90_s", "p99_s")
    class ErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_calls: int
    errors: _containers.ScalarMap[str, int]
    rate: float
    median_s: float
    p90_s: float
    p99_s: float
    def __init__(self, name: _Optional[str] = ..., num_calls: _Optional[int] = ..., errors: _Optional[_Mapping[str, int]] = ..., rate: _Optional[float] = ..., median_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...
