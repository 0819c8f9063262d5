"""A minimal HTTP/2 client that opens gRPC calls on a bare socket and then leaves them unfinished."""

from __future__ import annotations

import socket
import struct
from typing import Self

DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """Encode one frame (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(body))[1:] + struct.pack("!BBI", kind, flags, stream) + body


def literal(text: str) -> bytes:
    """Encode a header string without Huffman coding (RFC 7541, section 5.2)."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


class Connection:
    """A connection that opens calls. window is the number of bytes of each reply that it accepts: 0 accepts none."""

    def __init__(self, address: str, window: int = 65_535) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=20.0)
        settings = struct.pack("!HI", INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
        self._next_stream = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, sent: bytes = b"", *, is_whole: bool = False) -> None:
        """Open a call and send these bytes of its request; is_whole=True also ends the request."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "here",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(b"\0" + literal(name) + literal(value) for name, value in headers.items())
        out = frame(HEADERS, END_HEADERS, self._next_stream, block)
        if sent or is_whole:
            out += frame(DATA, END_STREAM if is_whole else 0, self._next_stream, sent)
        self._socket.sendall(out)
        self._next_stream += 2

    def close(self) -> None:
        self._socket.close()
