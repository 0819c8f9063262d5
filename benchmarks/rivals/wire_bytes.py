"""Bytes that this process's TCP connections carried, as counted by the kernel."""

from __future__ import annotations

import os
import socket
import struct

BYTES_ACKED = 120  # offset in struct tcp_info of linux/tcp.h; bytes_received follows
COUNTERS = struct.Struct("=QQ")


def bytes_to(port: int) -> int | None:
    """Return the bytes sent to and received from a port over open TCP connections; None if there are none."""
    found = [count for fd in open_fds() if (count := connection_bytes(fd, port)) is not None]
    return sum(found) if found else None


def open_fds() -> list[int]:
    """Return the file descriptors of this process."""
    return [int(name) for name in os.listdir("/proc/self/fd")]


def connection_bytes(fd: int, port: int) -> int | None:
    """Return the bytes of one TCP connection to a port, both ways; None for any other descriptor."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        return None  # not a socket
    try:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getpeername()[1] != port:
            return None
        counted = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + COUNTERS.size)
        sent, received = COUNTERS.unpack_from(counted, BYTES_ACKED)
        return int(sent + received)
    except OSError:
        return None  # a listening socket, or one that was just closed
    finally:
        connection.detach()  # the descriptor belongs to the code that opened it
