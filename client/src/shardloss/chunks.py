"""Large tensors sent separately from their message: first a header with chunk references, then the chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message

from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss.splice import Buffer, Spliced
from shardloss.v1 import tensor_pb2
from shardloss.wire import Contents, expected_bytes

M = TypeVar("M", bound=Message)
INLINE_BYTES = 1 << 16  # tensors up to this size stay inside the header
PIECE_BYTES = 1 << 20  # small, so that one piece is sent while the next is copied


def tensors_of(message: Message, path: str = "") -> Iterator[tuple[str, tensor_pb2.Tensor]]:
    """Yield every Tensor inside a message as (field path, tensor), in field order."""
    for field, value in message.ListFields():
        name = f"{path}.{field.name}" if path else field.name
        if field.message_type is None:
            continue
        items = value if field.is_repeated else [value]
        for item in items:
            if isinstance(item, tensor_pb2.Tensor):
                yield name, item
            else:
                yield from tensors_of(item, name)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the content of the chunk reference with the same id."""

    id: int
    content: Buffer


def detach(message: Spliced[M], owner: str, max_chunk_bytes: int) -> tuple[M, Iterator[Piece]]:
    """Return a copy of a message in which chunk references replace large tensors, and the pieces of these tensors.

    owner is the field of the tensor whose content is message.content.
    """
    header = type(message.message)()
    header.CopyFrom(message.message)
    contents: list[Buffer] = []
    if message.content is not None:
        refer(getattr(header, owner), message.content, contents)
    for _, tensor in tensors_of(header):
        if len(tensor.inline) > INLINE_BYTES:
            refer(tensor, tensor.inline, contents)
    return header, cut(contents, min(max_chunk_bytes, PIECE_BYTES))


def refer(tensor: tensor_pb2.Tensor, content: Buffer, contents: list[Buffer]) -> None:
    """Make a tensor refer to content as the next chunk, and append content to contents."""
    tensor.chunk.id, tensor.chunk.num_bytes = len(contents), len(content)
    contents.append(content)


def cut(contents: list[Buffer], piece_bytes: int) -> Iterator[Piece]:
    """Yield each content in pieces of at most piece_bytes; the index of the content in the list is its id."""
    for place, content in enumerate(contents):
        for start in range(0, len(content), piece_bytes):
            yield Piece(place, memoryview(content)[start : start + piece_bytes])


def spliced(piece: Piece, kind: type[M]) -> Spliced[M]:
    """Return a stream message of type kind whose chunk is the given piece."""
    return Spliced(kind(chunk=tensor_pb2.Chunk(id=piece.id)), piece.content)


def piece_of(message: Spliced[Any]) -> Piece:
    """Return the piece in a stream message.

    Raises:
        InvalidArgument: the message contains no chunk.
    """
    if message.message.WhichOneof("piece") != "chunk":
        raise InvalidArgument("only chunks may follow the header", field="piece")
    chunk = message.message.chunk
    return Piece(chunk.id, chunk.content if message.content is None else message.content)


class Assembler:
    """Collector of the chunks that a header announces; it refuses all others.

    Raises:
        InvalidArgument: a chunk reference does not match its tensor, or a chunk was not announced, is empty or is too
            long.
        LimitExceeded: the header announces more than max_bytes in total, or a chunk exceeds max_chunk_bytes.
    """

    def __init__(self, header: Message, max_bytes: int, max_chunk_bytes: int) -> None:
        self._max_chunk_bytes = max_chunk_bytes
        self._missing: dict[int, int] = {}
        self._contents: dict[int, memoryview] = {}
        for field, tensor in tensors_of(header):
            if tensor.WhichOneof("storage") == "chunk":
                self._announce(field, tensor)
        total = sum(self._missing.values())
        if total > max_bytes:
            raise LimitExceeded(f"the call announces {total} bytes in chunks; the limit is {max_bytes}", field="chunk")

    def _announce(self, field: str, tensor: tensor_pb2.Tensor) -> None:
        reference, expected = tensor.chunk, expected_bytes(tensor, field)
        if reference.num_bytes != expected:
            raise InvalidArgument(
                f"{field} announces {reference.num_bytes} bytes; its shape requires {expected}", field=field
            )
        if reference.id in self._missing:
            raise InvalidArgument(f"{field} refers to chunk {reference.id}, as does another tensor", field=field)
        self._missing[reference.id] = expected

    def add(self, chunk: Piece) -> None:
        """Store the next chunk."""
        if len(chunk.content) > self._max_chunk_bytes:
            message = f"a chunk of {len(chunk.content)} bytes exceeds max_chunk_bytes = {self._max_chunk_bytes}"
            raise LimitExceeded(message, field="chunk")
        if not chunk.content:
            raise InvalidArgument(f"chunk {chunk.id} is empty", field="chunk")
        if len(chunk.content) > self._missing.get(chunk.id, -1):
            raise InvalidArgument(f"chunk {chunk.id} was not announced or is longer than announced", field="chunk")
        missing = self._missing[chunk.id]
        if chunk.id not in self._contents:  # memory is allocated for chunks that arrive, not for announced ones
            self._contents[chunk.id] = np.empty(missing, np.uint8).data
        whole = self._contents[chunk.id]
        start = len(whole) - missing
        whole[start : start + len(chunk.content)] = chunk.content
        self._missing[chunk.id] = missing - len(chunk.content)

    @property
    def is_complete(self) -> bool:
        """True if every announced chunk has arrived."""
        return not any(self._missing.values())

    def contents(self) -> Contents:
        """Return every announced content by chunk id; raise `InvalidArgument` if a chunk is incomplete."""
        for place, missing in self._missing.items():
            if missing:
                raise InvalidArgument(f"chunk {place} lacks {missing} bytes at the end of the stream", field="chunk")
        return {place: self._contents.get(place, b"") for place in self._missing}
