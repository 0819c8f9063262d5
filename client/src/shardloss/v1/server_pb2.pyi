from shardloss.v1 import options_pb2 as _options_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "limits", "features", "num_workers", "devices")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    version: str
    limits: ServerLimits
    features: _containers.RepeatedScalarFieldContainer[str]
    num_workers: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., limits: _Optional[_Union[ServerLimits, _Mapping]] = ..., features: _Optional[_Iterable[str]] = ..., num_workers: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class ServerLimits(_message.Message):
    __slots__ = ("max_message_bytes", "max_chunk_bytes", "max_request_bytes", "max_reply_bytes", "max_batch", "max_num_true", "max_num_sampled", "max_dim", "max_num_classes", "max_num_shards", "max_table_bytes", "max_tables", "max_parts", "max_open_tickets", "max_ticket_bytes", "max_sessions", "max_calls_in_flight", "max_top_k", "ticket_ttl_s", "max_deadline_s", "max_streams", "stream_idle_s", "max_commits_in_flight", "max_calls_at_workers", "max_calls_arriving", "max_message_s", "session_ttl_s", "peer_ping_s", "peer_answer_s", "connection_idle_s")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_TRUE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    MAX_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TABLES_FIELD_NUMBER: _ClassVar[int]
    MAX_PARTS_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_TICKETS_FIELD_NUMBER: _ClassVar[int]
    MAX_TICKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    TICKET_TTL_S_FIELD_NUMBER: _ClassVar[int]
    MAX_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    STREAM_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_COMMITS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_AT_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_ARRIVING_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_S_FIELD_NUMBER: _ClassVar[int]
    SESSION_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PEER_PING_S_FIELD_NUMBER: _ClassVar[int]
    PEER_ANSWER_S_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_chunk_bytes: int
    max_request_bytes: int
    max_reply_bytes: int
    max_batch: int
    max_num_true: int
    max_num_sampled: int
    max_dim: int
    max_num_classes: int
    max_num_shards: int
    max_table_bytes: int
    max_tables: int
    max_parts: int
    max_open_tickets: int
    max_ticket_bytes: int
    max_sessions: int
    max_calls_in_flight: int
    max_top_k: int
    ticket_ttl_s: float
    max_deadline_s: float
    max_streams: int
    stream_idle_s: float
    max_commits_in_flight: int
    max_calls_at_workers: int
    max_calls_arriving: int
    max_message_s: float
    session_ttl_s: float
    peer_ping_s: float
    peer_answer_s: float
    connection_idle_s: float
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_reply_bytes: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_num_true: _Optional[int] = ..., max_num_sampled: _Optional[int] = ..., max_dim: _Optional[int] = ..., max_num_classes: _Optional[int] = ..., max_num_shards: _Optional[int] = ..., max_table_bytes: _Optional[int] = ..., max_tables: _Optional[int] = ..., max_parts: _Optional[int] = ..., max_open_tickets: _Optional[int] = ..., max_ticket_bytes: _Optional[int] = ..., max_sessions: _Optional[int] = ..., max_calls_in_flight: _Optional[int] = ..., max_top_k: _Optional[int] = ..., ticket_ttl_s: _Optional[float] = ..., max_deadline_s: _Optional[float] = ..., max_streams: _Optional[int] = ..., stream_idle_s: _Optional[float] = ..., max_commits_in_flight: _Optional[int] = ..., max_calls_at_workers: _Optional[int] = ..., max_calls_arriving: _Optional[int] = ..., max_message_s: _Optional[float] = ..., session_ttl_s: _Optional[float] = ..., peer_ping_s: _Optional[float] = ..., peer_answer_s: _Optional[float] = ..., connection_idle_s: _Optional[float] = ...) -> None: ...
