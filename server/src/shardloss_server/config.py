"""The settings of a server, each defined once with its name, type, bounds, default and meaning.

`settings.py` reads their values from flags, the environment and a file. docs/configuration.md is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from shardloss_server.machine import memory_limit_bytes

MIB = 2**20
LONGEST_S = 1_000_000  # 11 days: gRPC counts milliseconds in 31 bits, and the timeout of a lock must be finite
MOST_MESSAGE_BYTES = 2**30  # gRPC and protobuf count a message's bytes in 31 bits
FRAMING_BYTES = 1 << 16  # room for the protobuf tags around a chunk or a message at its limit
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def a(meaning: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """Return the pydantic field of a setting: its meaning, with the unit, and its bounds."""
    return Field(description=meaning, ge=ge, gt=gt, le=le)


class CannotServe(Exception):
    """An error that keeps a server from starting; its message is for the operator."""


@dataclass(frozen=True, slots=True)
class Listening:
    """The addresses that the server listens on, its threads and its shutdown."""

    host: Annotated[str, a("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, a("Data port; 0 picks a free one.", ge=0, le=65535)] = 7070
    admin_port: Annotated[int, a("Port for health, status and reflection; 0 picks a free one.", ge=0, le=65535)] = 7071
    socket: Annotated[str, a("Path of a Unix socket to listen on as well; clients connect to unix:PATH.")] = ""
    # Every call (arriving, in flight, stream or commit) holds a thread from its first byte; refusals need threads, too.
    num_threads: Annotated[int, a("Threads that serve calls; each call holds one from its first byte.", ge=4)] = 192
    drain_s: Annotated[
        float, a("Seconds that calls in flight are given to finish at shutdown.", ge=0, le=LONGEST_S)
    ] = 10.0
    ready_file: Annotated[
        Path | None,
        a("File to which host:port of the data port is written once the server is serving; removed when it stops."),
    ] = None


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers that hold the shards."""

    workers: Annotated[
        int, a("Worker processes, one per GPU or per core; 0: as many as Ray has GPUs, or CPUs if it has no GPU.", ge=0)
    ] = 2
    worker_threads: Annotated[int, a("Compute threads of each worker.", ge=1)] = 1
    keep_mib: Annotated[
        int,
        a(
            "MiB of results that each worker may keep between a loss and its step; 0: the step recomputes them. By "
            "default 512, or a sixteenth of the memory if less.",
            ge=0,
        ),
    ] = field(default_factory=lambda: min(512, memory_limit_bytes() // 16 // MIB))
    links: Annotated[bool, a("Call the workers over sockets (links); if off, through plain Ray calls.")] = True
    ray_address: Annotated[
        str | None, a("Address of a Ray cluster to join; if absent, the server starts an embedded Ray.")
    ] = None
    start_timeout_s: Annotated[
        float, a("Seconds within which Ray and the workers must have started.", gt=0, le=LONGEST_S)
    ] = 300.0
    local: Annotated[bool, a("Run the shards as threads of the server's own process, without Ray.")] = False


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server in bytes, counts and seconds, as GetServerInfo reports them."""

    max_message_bytes: Annotated[
        int, a("Bytes of one message in either direction; larger losses are streamed.", ge=1, le=MOST_MESSAGE_BYTES)
    ] = 4 * MIB
    max_chunk_bytes: Annotated[int, a("Bytes of one chunk of a stream.", ge=1)] = 2 * MIB
    max_request_bytes: Annotated[int, a("Bytes of all chunked tensors of one streamed loss.", ge=1)] = 256 * MIB
    max_reply_bytes: Annotated[int, a("Bytes of the tensors of one reply.", ge=1)] = 256 * MIB
    max_batch: Annotated[int, a("Rows of a batch, N.", ge=1)] = 1 << 18
    max_num_true: Annotated[int, a("Labels per row, T.", ge=1)] = 1024
    max_num_sampled: Annotated[int, a("Sampled candidates, S.", ge=1)] = 1 << 22
    max_dim: Annotated[int, a("Columns of a table, D.", ge=1)] = 1 << 16
    max_num_classes: Annotated[int, a("Classes of a table, V.", ge=1)] = 1 << 40
    max_num_shards: Annotated[int, a("Shards of a table, K.", ge=1)] = 4096
    max_table_bytes: Annotated[
        int,
        a("Bytes of all tables with their optimizer state; by default half of what this process may use.", ge=1),
    ] = field(default_factory=lambda: memory_limit_bytes() // 2)
    max_tables: Annotated[int, a("Tables that exist at the same time.", ge=1)] = 64
    max_parts: Annotated[int, a("Parts of one commit.", ge=1)] = 4096
    max_open_tickets: Annotated[int, a("Open tickets over all tables.", ge=1)] = 4096
    max_ticket_bytes: Annotated[
        int,
        a(
            "Bytes that the front end keeps for open tickets over all tables; each worker keeps as many for its own "
            "tables. By default 2.5 GiB, or a sixth of the memory that this server may use if that is less.",
            ge=1,
        ),
    ] = field(default_factory=lambda: min(5 * 2**29, memory_limit_bytes() // 6))
    max_sessions: Annotated[int, a("Sessions that one table remembers.", ge=1)] = 1 << 16
    max_calls_in_flight: Annotated[int, a("Concurrent calls, not counting commits and streams.", ge=1)] = 64
    max_top_k: Annotated[int, a("Best classes or hard negatives per row, k.", ge=1)] = 1 << 14
    ticket_ttl_s: Annotated[
        float, a("Seconds after the last call of its session at which an open ticket expires.", gt=0, le=LONGEST_S)
    ] = 600.0
    max_deadline_s: Annotated[
        float, a("Seconds that a call may take; longer deadlines are reduced to this.", gt=0, le=LONGEST_S)
    ] = 600.0
    max_streams: Annotated[int, a("Concurrent streamed losses.", ge=1)] = 8
    max_commits_in_flight: Annotated[int, a("Concurrent commits and aborts.", ge=1)] = 16
    stream_idle_s: Annotated[
        float, a("Seconds without a byte after which a stream is dropped.", gt=0, le=LONGEST_S)
    ] = 10.0
    max_calls_at_workers: Annotated[
        int, a("Calls that use the workers at the same time; other calls wait, and callers take turns.", ge=1)
    ] = 8
    max_calls_arriving: Annotated[int, a("Concurrent calls whose request message is still arriving.", ge=1)] = 64
    max_message_s: Annotated[
        float,
        a(
            "Seconds within which a message must arrive, in either direction; otherwise its call is dropped.",
            gt=0,
            le=LONGEST_S,
        ),
    ] = 30.0
    session_ttl_s: Annotated[
        float,
        a("Seconds after its last call at which a session without open tickets is forgotten.", gt=0, le=LONGEST_S),
    ] = 3600.0
    peer_ping_s: Annotated[
        float, a("Seconds of silence on a connection after which its peer is pinged.", ge=1, le=LONGEST_S)
    ] = 20.0
    peer_answer_s: Annotated[
        float, a("Seconds within which a pinged peer must answer, or its connection and calls end.", ge=1, le=LONGEST_S)
    ] = 10.0
    connection_idle_s: Annotated[
        float,
        a(
            "Seconds without a call after which a connection is closed; clients reconnect by themselves.",
            ge=1,
            le=LONGEST_S,
        ),
    ] = 3600.0


@dataclass(frozen=True, slots=True)
class Security:
    """Encryption and access control (docs/security.md)."""

    tls_cert_file: Annotated[
        Path | None, a("PEM file with the server's certificate chain; if set, both ports use TLS.")
    ] = None
    tls_key_file: Annotated[Path | None, a("PEM file with the private key of the server's certificate.")] = None
    tls_client_ca_file: Annotated[
        Path | None,
        a("PEM file with the CAs that must have signed a client's certificate; if set, TLS is mutual."),
    ] = None
    tokens_file: Annotated[
        Path | None, a("TOML file with the tokens that the server accepts; if absent, calls need no token.")
    ] = None
    allow_plaintext_tokens: Annotated[
        bool, a("Accept tokens without TLS on a non-loopback address, although others may read them in transit.")
    ] = False
    allow_anonymous: Annotated[
        bool, a("Serve on a non-loopback address without tokens or mutual TLS; every caller is then admin.")
    ] = False


@dataclass(frozen=True, slots=True)
class Watching:
    """Metrics, logs and traces (docs/metrics.md)."""

    metrics_port: Annotated[
        int | None,
        a("Port of the Prometheus metrics (/metrics); 0 picks a free one; if absent, there are none.", ge=0, le=65535),
    ] = None
    metrics_host: Annotated[str, a("Address of the metrics port.")] = "127.0.0.1"
    log_format: Annotated[Literal["text", "json"], a("Format of log lines.")] = "text"
    log_level: Annotated[LogLevel, a("Lowest level that is logged.")] = "INFO"
    slow_call_s: Annotated[float, a("Seconds above which a call is logged as slow.", ge=0)] = 1.0
    log_calls: Annotated[bool, a("Log every call, not only failed and slow ones.")] = False
    tracing: Annotated[
        bool, a("Export a trace of each call by OTLP, as set by OTEL_EXPORTER_OTLP_*; needs shardloss-server[tracing].")
    ] = False


ANY_PORT = Listening(port=0, admin_port=0)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The settings of a running server, except those of its workers."""

    listening: Listening = ANY_PORT
    limits: Limits = field(default_factory=Limits)
    security: Security = field(default_factory=Security)
    watching: Watching = field(default_factory=Watching)
