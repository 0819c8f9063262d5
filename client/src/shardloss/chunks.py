"""Large tensors beside their message: a header with chunk references, then the chunks, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message

from shardloss.errors import InvalidArgument, LimitExceeded
from shardloss.v1 import tensor_pb2
from shardloss.wire import expected_bytes

M = TypeVar("M", bound=Message)
INLINE_BYTES = 1 << 16  # tensors up to this size stay inside the header


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


def detach(message: M, max_chunk_bytes: int) -> tuple[M, Iterator[tensor_pb2.Chunk]]:
    """A header like the message with its large tensors as chunk references, and the chunks that hold them."""
    header = type(message)()
    header.CopyFrom(message)
    contents: list[bytes] = []
    for _, tensor in tensors_of(header):
        if len(tensor.inline) > INLINE_BYTES:
            content = tensor.inline
            tensor.chunk.id, tensor.chunk.num_bytes = len(contents), len(content)
            contents.append(content)
    return header, cut(contents, max_chunk_bytes)


def cut(contents: list[bytes], max_chunk_bytes: int) -> Iterator[tensor_pb2.Chunk]:
    """Each content in pieces, its place in the list as its id."""
    for place, content in enumerate(contents):
        for start in range(0, len(content), max_chunk_bytes):
            yield tensor_pb2.Chunk(id=place, content=content[start : start + max_chunk_bytes])


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
        for field, tensor in tensors_of(header):
            if tensor.WhichOneof("storage") == "chunk":
                self._announce(field, tensor)
        total = sum(self._missing.values())
        if total > max_bytes:
            raise LimitExceeded(f"the call announces {total} bytes in chunks; {max_bytes} are taken", field="chunk")
        self._pieces: dict[int, list[bytes]] = {place: [] for place in self._missing}

    def _announce(self, field: str, tensor: tensor_pb2.Tensor) -> None:
        reference, expected = tensor.chunk, expected_bytes(tensor, field)
        if reference.num_bytes != expected:
            raise InvalidArgument(
                f"{field} announces {reference.num_bytes} bytes; its shape takes {expected}", field=field
            )
        if reference.id in self._missing:
            raise InvalidArgument(f"{field} refers to chunk {reference.id}, as another tensor does", field=field)
        self._missing[reference.id] = expected

    def add(self, chunk: tensor_pb2.Chunk) -> None:
        """Take the next chunk."""
        if len(chunk.content) > self._max_chunk_bytes:
            message = f"a chunk of {len(chunk.content)} bytes exceeds max_chunk_bytes = {self._max_chunk_bytes}"
            raise LimitExceeded(message, field="chunk")
        if not chunk.content:
            raise InvalidArgument(f"chunk {chunk.id} is empty", field="chunk")
        if len(chunk.content) > self._missing.get(chunk.id, -1):
            raise InvalidArgument(f"chunk {chunk.id} was not announced or is longer than announced", field="chunk")
        self._missing[chunk.id] -= len(chunk.content)
        self._pieces[chunk.id].append(chunk.content)

    @property
    def is_complete(self) -> bool:
        """Whether every announced chunk has come."""
        return not any(self._missing.values())

    def contents(self) -> dict[int, bytes]:
        """Every announced content by id, once all chunks have come."""
        for place, missing in self._missing.items():
            if missing:
                raise InvalidArgument(f"chunk {place} lacks {missing} bytes at the end of the stream", field="chunk")
        return {place: b"".join(pieces) for place, pieces in self._pieces.items()}
