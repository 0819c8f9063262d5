"""The same bytes sent and returned over a bare Unix socket, with reused buffers: the cost of the kernel's copies alone.

The shape: bytes, each way.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.rivals.child import Child, main, serve_child

MODULE = "benchmarks.rivals.unix_echo"


class Echo:
    """The caller, with the server in a child process."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        self.directory = tempfile.TemporaryDirectory()
        path = os.path.join(self.directory.name, "socket")
        self.server = Child(MODULE, {**shape, "path": path})
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.hidden, self.reply = os.urandom(shape["bytes"]), bytearray(shape["bytes"])

    def versions(self) -> Mapping[str, str]:
        return {}

    def step(self) -> None:
        self.socket.sendall(self.hidden)
        assert receive(self.socket, self.reply)

    def close(self) -> None:
        """End the server."""
        self.socket.close()
        self.server.stop()
        self.directory.cleanup()


def receive(source: socket.socket, buffer: bytearray) -> bool:
    """Fill a buffer; return False if the other end has closed."""
    left = memoryview(buffer)
    while left:
        count = source.recv_into(left)
        if count == 0:
            return False
        left = left[count:]
    return True


def run_server(shape: Mapping[str, Any]) -> None:
    """Echo the received bytes until the caller closes the connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(shape["path"])
    listener.listen(1)
    serve_child({"ready": True}, lambda: answer(listener, bytearray(shape["bytes"])))


def answer(listener: socket.socket, buffer: bytearray) -> None:
    """Echo whole buffers over the first connection."""
    connection, _ = listener.accept()
    while receive(connection, buffer):
        connection.sendall(buffer)


if __name__ == "__main__":
    main(Echo, run_server)
