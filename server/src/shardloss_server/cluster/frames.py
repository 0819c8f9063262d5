"""Frames on a socket between the front end and a worker: a number, a kind, and one value.

    frame    kind u8, 7 bytes of 0, number u64, body length u64 (little-endian), body
    body     pickle length u64, count of buffers u64, their lengths u64 each, pickle, buffers; the pickle and each
             buffer begin at a multiple of ALIGNMENT from the body's start

The value is pickled. Its large tensors are sent next to the pickle as raw buffers, so neither side copies them.
A pickle can run code, so frames are read only from peers that have passed `handshake`.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEADER = struct.Struct("<B7xQQ")
COUNTS = struct.Struct("<QQ")
ALIGNMENT = 64
SOCKET_BYTES = 4 << 20
SILENT_S, PROBE_S, PROBES = 10, 5, 3  # a peer that is cut off is detected after 25 s
SMALL_BYTES = 1 << 12  # smaller tensors stay inside the pickle
VECTORS = 64  # buffers passed to one sendmsg; the kernel accepts 1024
PADDING = bytes(ALIGNMENT)

Buffer = bytes | bytearray | memoryview


class LinkClosed(Exception):
    """The other end of a link is gone."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame; its body is not decoded yet."""

    kind: int
    number: int
    body: memoryview


def rebuild(content: Buffer, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that shares the memory of the received bytes."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape)


def reduce_tensor(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Return a tensor's pickled form: `rebuild` and its arguments, the first being the tensor's bytes as a buffer."""
    tensor = tensor.detach().cpu().contiguous()
    content = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    return rebuild, (pickle.PickleBuffer(content.data), tensor.dtype, tuple(tensor.shape))


def encode(value: object, name_of: Callable[[object], object] | None = None) -> list[Buffer]:
    """Encode a value as a body, in pieces; name_of(object) is what to send in its place, or None to send the object."""
    buffers: list[memoryview] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        content = buffer.raw()
        if content.nbytes < SMALL_BYTES:
            return True
        buffers.append(content)
        return False

    stream = io.BytesIO()
    pickler = Pickler(stream, beside, name_of)
    pickler.dump(value)
    content = stream.getbuffer()
    sizes = struct.pack(f"<{len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
    pieces: list[Buffer] = []
    for piece in (memoryview(COUNTS.pack(content.nbytes, len(buffers)) + sizes), content, *buffers):
        pieces += [piece, PADDING[: -piece.nbytes % ALIGNMENT]]
    return pieces


class Pickler(pickle.Pickler):
    """A pickler (protocol 5) that writes tensors as buffers and replaces some objects with names."""

    dispatch_table = {Tensor: reduce_tensor}  # noqa: RUF012  (pickle looks for this attribute)

    def __init__(
        self,
        stream: io.BytesIO,
        beside: Callable[[pickle.PickleBuffer], bool],
        name_of: Callable[[object], object] | None,
    ) -> None:
        super().__init__(stream, protocol=5, buffer_callback=beside)
        self._name_of = name_of

    def persistent_id(self, value: object) -> object:
        """Return the name to send in place of an object, or None to pickle the object itself."""
        return None if self._name_of is None else self._name_of(value)


class Unpickler(pickle.Unpickler):
    """The counterpart of `Pickler`: reads tensors from buffers and resolves names."""

    def __init__(
        self, stream: io.BytesIO, buffers: Sequence[Buffer], named: Callable[[Any], object] | None = None
    ) -> None:
        super().__init__(stream, buffers=buffers)
        self._named = named

    def persistent_load(self, name: Any) -> object:
        """Return the object that a name stands for."""
        if self._named is None:
            raise pickle.UnpicklingError(f"the frame names an object {name!r}, but no names are expected here")
        return self._named(name)


def decode(body: memoryview, named: Callable[[Any], object] | None = None) -> Any:
    """Decode the value of a body; its large tensors share the body's memory."""
    pickle_bytes, num_buffers = COUNTS.unpack_from(body)
    sizes = struct.unpack_from(f"<{num_buffers}Q", body, COUNTS.size)
    at = aligned(COUNTS.size + 8 * num_buffers)
    content, at = body[at : at + pickle_bytes], aligned(at + pickle_bytes)
    buffers = []
    for size in sizes:
        buffers.append(body[at : at + size])
        at = aligned(at + size)
    return Unpickler(io.BytesIO(content), buffers, named).load()


def aligned(offset: int) -> int:
    """Round an offset up to a multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def send(sock: socket.socket, kind: int, number: int, body: Sequence[Buffer] = ()) -> None:
    """Send one frame; only one thread may send on a socket at a time.

    Raises:
        OSError: the other end is gone, or does not read.
    """
    pieces = [memoryview(piece) for piece in body]
    length = sum(piece.nbytes for piece in pieces)
    send_all(sock, [memoryview(HEADER.pack(kind, number, length)), *(piece for piece in pieces if piece.nbytes)])


def send_all(sock: socket.socket, pieces: list[memoryview]) -> None:
    """Send every byte of the pieces, in order."""
    first = 0
    while first < len(pieces):
        sent = sock.sendmsg(pieces[first : first + VECTORS])
        while first < len(pieces) and sent >= pieces[first].nbytes:
            sent -= pieces[first].nbytes
            first += 1
        if sent:
            pieces[first] = pieces[first][sent:]


def receive(sock: socket.socket) -> Frame:
    """Wait for the next frame.

    Raises:
        LinkClosed, OSError: the other end is gone.
    """
    kind, number, length = HEADER.unpack(receive_bytes(sock, HEADER.size))
    return Frame(kind, number, receive_bytes(sock, length))


def receive_bytes(sock: socket.socket, num_bytes: int) -> memoryview:
    """Receive num_bytes bytes into newly allocated memory, which is not zeroed first."""
    content = np.empty(num_bytes, dtype=np.uint8).data
    rest = content
    while rest.nbytes:
        came = sock.recv_into(rest)
        if came == 0:
            raise LinkClosed("the other end closed the link")
        rest = rest[came:]
    return content


def configure(sock: socket.socket) -> None:
    """Set the socket options that both ends of a link use."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (SILENT_S + PROBE_S * PROBES))


def timeval(seconds: int) -> bytes:
    """Pack seconds as a struct timeval of the C library, for socket options."""
    return struct.pack("@ll", seconds, 0)
