"""Status that a running server reports on its admin port; proto/shardloss/v1/admin.proto has units and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from shardloss.v1 import admin_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The status of one worker; if it is not up, all fields except index, device and num_restarts are 0 or empty."""

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


@dataclass(frozen=True, slots=True)
class TableStatus:
    """The status of one table; num_bytes is the size of its rows, biases, state and label counts together."""

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


@dataclass(frozen=True, slots=True)
class PlacesStatus:
    """The calls of one kind that hold a place, their bytes, and the limits of both."""

    name: str
    num_calls: int
    num_bytes: int
    max_calls: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class MethodStatus:
    """Statistics of one method: calls and errors (by reason) since the start; rate and durations in the last minute.

    If rate is 0, there were no calls in that minute, and the durations are 0.
    """

    name: str
    num_calls: int
    errors: Mapping[str, int]
    rate: float
    median_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """Status of a server at one moment; time_s is its clock in seconds since 1970; without /dev/shm its sizes are 0."""

    versions: Mapping[str, str]
    uptime_s: float
    time_s: float
    num_workers: int
    workers: Sequence[WorkerStatus]
    shm_free_bytes: int
    shm_total_bytes: int
    tables: Sequence[TableStatus]
    places: Sequence[PlacesStatus]
    num_refused: int
    methods: Sequence[MethodStatus]


PARTS = {"workers": WorkerStatus, "tables": TableStatus, "places": PlacesStatus, "methods": MethodStatus}


def server_status(message: admin_pb2.Status) -> ServerStatus:
    """Return the status in a message."""
    return of(
        ServerStatus, message, **{name: [of(kind, m) for m in getattr(message, name)] for name, kind in PARTS.items()}
    )


def of(kind: type[T], message: Message, **known: Any) -> T:
    """Return a dataclass filled from a message's fields of the same names; maps become dicts."""
    names = [field.name for field in fields(kind) if field.name not in known]  # type: ignore[arg-type]
    values = {name: getattr(message, name) for name in names}
    plain = {name: dict(value) if hasattr(value, "items") else value for name, value in values.items()}
    return kind(**plain, **known)
