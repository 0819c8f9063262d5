"""Large tensors beside their message: a header with chunk references, then the chunks, both ways."""

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
PIECE_BYTES = 1 << 20  # a piece on its way while the next is copied


def tensors_of(message: Message, path: str = "") -> Iterator[tuple[str, tensor_pb2.Tensor]]:
    """Every Tensor inside a message with its field path, in field order."""
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
    """A piece of the content of a chunk reference."""

    id: int
    content: Buffer


def detach(message: Spliced[M], owner: str, max_chunk_bytes: int) -> tuple[M, Iterator[Piece]]:
    """A header like the message with its large tensors as chunk references, and the pieces that belong to them.

    owner is the field of the tensor whose content stands beside the message.
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
    """Make the next content the tensor's."""
    tensor.chunk.id, tensor.chunk.num_bytes = len(contents), len(content)
    contents.append(content)


def cut(contents: list[Buffer], piece_bytes: int) -> Iterator[Piece]:
    """Each content in pieces, its place in the list as its id."""
    for place, content in enumerate(contents):
        for start in range(0, len(content), piece_bytes):
            yield Piece(place, memoryview(content)[start : start + piece_bytes])


def spliced(piece: Piece, kind: type[M]) -> Spliced[M]:
    """A message of a stream, of a kind that has a chunk, that carries a piece."""
    return Spliced(kind(chunk=tensor_pb2.Chunk(id=piece.id)), piece.content)


def piece_of(message: Spliced[Any]) -> Piece:
    """What a message of a stream carries.

    Raises:
        InvalidArgument: no chunk.
    """
    if message.message.WhichOneof("piece") != "chunk":
        raise InvalidArgument("only chunks may follow the header", field="piece")
    chunk = message.message.chunk
    return Piece(chunk.id, chunk.content if message.content is None else message.content)


class Assembler:
    """Collects the chunks that a header announced, and nothing else.

    Raises:
        InvalidArgument: a reference and its tensor do not fit, or a chunk comes that was not announced, is empty or is
            too long.
        LimitExceeded: the header announces more than max_bytes in all, or a chunk is above max_chunk_bytes.
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
            raise LimitExceeded(f"the call announces {total} bytes in chunks; {max_bytes} are taken", field="chunk")

    def _announce(self, field: str, tensor: tensor_pb2.Tensor) -> None:
        reference, expected = tensor.chunk, expected_bytes(tensor, field)
        if reference.num_bytes != expected:
            raise InvalidArgument(
                f"{field} announces {reference.num_bytes} bytes; its shape takes {expected}", field=field
            )
        if reference.id in self._missing:
            raise InvalidArgument(f"{field} refers to chunk {reference.id}, as another tensor does", field=field)
        self._missing[reference.id] = expected

    def add(self, chunk: Piece) -> None:
        """Take the next chunk."""
        if len(chunk.content) > self._max_chunk_bytes:
            message = f"a chunk of {len(chunk.content)} bytes exceeds max_chunk_bytes = {self._max_chunk_bytes}"
            raise LimitExceeded(message, field="chunk")
        if not chunk.content:
            raise InvalidArgument(f"chunk {chunk.id} is empty", field="chunk")
        if len(chunk.content) > self._missing.get(chunk.id, -1):
            raise InvalidArgument(f"chunk {chunk.id} was not announced or is longer than announced", field="chunk")
        missing = self._missing[chunk.id]
        if chunk.id not in self._contents:  # memory is taken for what comes, not for what is announced
            self._contents[chunk.id] = np.empty(missing, np.uint8).data
        whole = self._contents[chunk.id]
        start = len(whole) - missing
        whole[start : start + len(chunk.content)] = chunk.content
        self._missing[chunk.id] = missing - len(chunk.content)

    @property
    def is_complete(self) -> bool:
        """Whether every announced chunk has come."""
        return not any(self._missing.values())

    def contents(self) -> Contents:
        """Every announced content by id, once all chunks have come."""
        for place, missing in self._missing.items():
            if missing:
                raise InvalidArgument(f"chunk {place} lacks {missing} bytes at the end of the stream", field="chunk")
        return {place: self._contents.get(place, b"") for place in self._missing}
