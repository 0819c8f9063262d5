"""Limits and settings of a server, as GetServerInfo reports them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

MIB = 2**20
FRAMING_BYTES = 1 << 16  # a chunk or a message at its limit still needs its tags


def physical_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes: bytes, counts and seconds. The meaning of each is in proto/shardloss/v1/server.proto."""

    max_message_bytes: int = 4 * MIB
    max_chunk_bytes: int = 2 * MIB
    max_request_bytes: int = 256 * MIB
    max_reply_bytes: int = 256 * MIB
    max_batch: int = 1 << 18
    max_num_true: int = 1024
    max_num_sampled: int = 1 << 22
    max_dim: int = 1 << 16
    max_num_classes: int = 1 << 40
    max_num_shards: int = 4096
    max_table_bytes: int = field(default_factory=lambda: physical_memory_bytes() // 2)
    max_tables: int = 64
    max_parts: int = 4096
    max_open_tickets: int = 4096
    max_ticket_bytes: int = 2 * 2**30
    max_sessions: int = 1 << 16
    max_calls_in_flight: int = 64
    max_top_k: int = 1 << 14
    ticket_ttl_s: float = 600.0
    max_deadline_s: float = 600.0
    max_streams: int = 8
    max_commits_in_flight: int = 16
    stream_idle_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where to listen and with how many threads; socket is the path of a Unix socket beside the data port."""

    host: str = "127.0.0.1"
    port: int = 0
    socket: str = ""
    admin_port: int = 0
    num_threads: int = (
        102  # above max_calls_in_flight: a sixth is for streams, a sixth for commits, and refusals need some
    )
    drain_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
