"""Every setting of a server, defined once: its name, type, bounds, default and meaning.

`settings.py` reads them from flags, the environment and a file; docs/configuration.md is made of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

MIB = 2**20
LONGEST_S = 1_000_000  # 11 days: gRPC counts milliseconds in 31 bits, and no lock waits for ever in a number
MOST_MESSAGE_BYTES = 2**30  # gRPC and protobuf count a message's bytes in 31 bits
FRAMING_BYTES = 1 << 16  # a chunk or a message at its limit still needs its tags
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def a(meaning: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """What a setting means, in what unit, and its bounds."""
    return Field(description=meaning, ge=ge, gt=gt, le=le)


class CannotServe(Exception):
    """Why a server cannot start; the message is for its operator."""


def physical_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the server listens, and how it stops."""

    host: Annotated[str, a("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, a("Data port; 0 takes a free one.", ge=0, le=65535)] = 7070
    admin_port: Annotated[int, a("Port of health, status and reflection; 0 takes a free one.", ge=0, le=65535)] = 7071
    socket: Annotated[str, a("Path of a Unix socket to listen on as well, for unix:PATH.")] = ""
    # Each call holds one from its first byte: under way, as a stream or a commit, or arriving; and refusals need some.
    num_threads: Annotated[
        int, a("Threads that take calls; a call holds one while its message arrives, too.", ge=4)
    ] = 192
    drain_s: Annotated[float, a("Seconds that calls in flight have at a stop.", ge=0, le=LONGEST_S)] = 10.0
    ready_file: Annotated[Path | None, a("File that gets host:port of the data port once it serves.")] = None


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers that hold the shards."""

    workers: Annotated[
        int, a("Worker processes: one a GPU, or one a core; 0: as many as Ray has GPUs, or else CPUs.", ge=0)
    ] = 2
    worker_threads: Annotated[int, a("Threads that each worker computes with.", ge=1)] = 1
    keep_mib: Annotated[
        int, a("MiB that each worker may keep between a loss and its step; 0: it computes anew.", ge=0)
    ] = 512
    links: Annotated[bool, a("Workers answer over links; without them as plain Ray calls.")] = True
    ray_address: Annotated[str | None, a("Join this Ray cluster; absent: an embedded Ray.")] = None
    local: Annotated[bool, a("Shards as threads of the server's own process, without Ray.")] = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes, as GetServerInfo reports it: bytes, counts and seconds."""

    max_message_bytes: Annotated[
        int, a("Bytes of one message, either way; larger losses are streamed.", ge=1, le=MOST_MESSAGE_BYTES)
    ] = 4 * MIB
    max_chunk_bytes: Annotated[int, a("Bytes of one chunk of a stream.", ge=1)] = 2 * MIB
    max_request_bytes: Annotated[int, a("Bytes of all chunked tensors of one streamed loss.", ge=1)] = 256 * MIB
    max_reply_bytes: Annotated[int, a("Bytes of one reply's tensors.", ge=1)] = 256 * MIB
    max_batch: Annotated[int, a("Rows of a batch, N.", ge=1)] = 1 << 18
    max_num_true: Annotated[int, a("Labels of a row, T.", ge=1)] = 1024
    max_num_sampled: Annotated[int, a("Sampled candidates, S.", ge=1)] = 1 << 22
    max_dim: Annotated[int, a("Columns of a table, D.", ge=1)] = 1 << 16
    max_num_classes: Annotated[int, a("Classes of a table, V.", ge=1)] = 1 << 40
    max_num_shards: Annotated[int, a("Shards of a table, K.", ge=1)] = 4096
    max_table_bytes: Annotated[
        int, a("Bytes of all tables with their optimizer state; half of this machine's memory.", ge=1)
    ] = field(default_factory=lambda: physical_memory_bytes() // 2)
    max_tables: Annotated[int, a("Tables at once.", ge=1)] = 64
    max_parts: Annotated[int, a("Parts of one commit.", ge=1)] = 4096
    max_open_tickets: Annotated[int, a("Open tickets over all tables.", ge=1)] = 4096
    max_ticket_bytes: Annotated[int, a("Bytes kept for open tickets over all tables.", ge=1)] = 2 * 2**30
    max_sessions: Annotated[int, a("Sessions that a table remembers.", ge=1)] = 1 << 16
    max_calls_in_flight: Annotated[int, a("Calls at once, beside commits and streams.", ge=1)] = 64
    max_top_k: Annotated[int, a("k of the best classes asked for.", ge=1)] = 1 << 14
    ticket_ttl_s: Annotated[
        float, a("Seconds after its session's last call in which an open ticket expires.", gt=0, le=LONGEST_S)
    ] = 600.0
    max_deadline_s: Annotated[
        float, a("Seconds that a call may take; longer deadlines are cut to it.", gt=0, le=LONGEST_S)
    ] = 600.0
    max_streams: Annotated[int, a("Streamed losses at once.", ge=1)] = 8
    max_commits_in_flight: Annotated[int, a("Commits and aborts at once.", ge=1)] = 16
    stream_idle_s: Annotated[
        float, a("Seconds without a byte after which a stream is dropped.", gt=0, le=LONGEST_S)
    ] = 10.0
    max_calls_at_workers: Annotated[
        int, a("Calls at the workers at once; others wait for their turn, by caller.", ge=1)
    ] = 8
    max_calls_arriving: Annotated[int, a("Calls at once whose message is on its way.", ge=1)] = 64
    max_message_s: Annotated[
        float,
        a("Seconds in which a message, either way, must be across; else its call is dropped.", gt=0, le=LONGEST_S),
    ] = 30.0
    session_ttl_s: Annotated[
        float,
        a("Seconds after its last call in which a session without open tickets is forgotten.", gt=0, le=LONGEST_S),
    ] = 3600.0
    peer_ping_s: Annotated[
        float, a("Seconds of silence on a connection after which its peer is asked.", ge=1, le=LONGEST_S)
    ] = 20.0
    peer_answer_s: Annotated[
        float, a("Seconds in which an asked peer must answer; else its connection and calls end.", ge=1, le=LONGEST_S)
    ] = 10.0
    connection_idle_s: Annotated[
        float,
        a(
            "Seconds without a call after which a connection is closed; clients connect again by themselves.",
            ge=1,
            le=LONGEST_S,
        ),
    ] = 3600.0


@dataclass(frozen=True, slots=True)
class Security:
    """Who may connect, and what they may do (docs/security.md)."""

    tls_cert_file: Annotated[Path | None, a("PEM certificate chain of the server; with it both ports speak TLS.")] = (
        None
    )
    tls_key_file: Annotated[Path | None, a("PEM private key of that certificate.")] = None
    tls_client_ca_file: Annotated[
        Path | None, a("PEM certificates that clients' certificates must descend from: mutual TLS.")
    ] = None
    tokens_file: Annotated[Path | None, a("TOML file of the tokens that may call; absent: no tokens.")] = None
    allow_plaintext_tokens: Annotated[
        bool, a("Take tokens without TLS off this machine, where others may read them.")
    ] = False
    allow_anonymous: Annotated[bool, a("Serve off this machine without tokens or mutual TLS: everyone is admin.")] = (
        False
    )


@dataclass(frozen=True, slots=True)
class Watching:
    """What the server shows of itself (docs/metrics.md)."""

    metrics_port: Annotated[
        int | None, a("Port of the Prometheus metrics, at /metrics; 0 takes a free one; absent: none.", ge=0, le=65535)
    ] = None
    metrics_host: Annotated[str, a("Address that the metrics listen on.")] = "127.0.0.1"
    log_format: Annotated[Literal["text", "json"], a("How log lines are written.")] = "text"
    log_level: Annotated[LogLevel, a("The least level that is logged.")] = "INFO"
    slow_call_s: Annotated[float, a("Seconds above which a call gets a line in the log.", ge=0)] = 1.0
    log_calls: Annotated[bool, a("A line in the log for every call, not only for failed and slow ones.")] = False
    tracing: Annotated[
        bool, a("Send a trace of each call by OTLP, as OTEL_EXPORTER_OTLP_* say; needs shardloss-server[tracing].")
    ] = False


ANY_PORT = Listening(port=0, admin_port=0)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a running server is made of, beside its workers."""

    listening: Listening = ANY_PORT
    limits: Limits = field(default_factory=Limits)
    security: Security = field(default_factory=Security)
    watching: Watching = field(default_factory=Watching)
