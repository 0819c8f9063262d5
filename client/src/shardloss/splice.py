"""One large tensor kept apart from its message, and inserted into or extracted from the message's bytes directly.

The bytes on the wire are those of a plain message, which any implementation of the contract can read. Protobuf alone
would copy the content of a tensor four times when sending and three times when receiving; this module copies it once in
each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from shardloss.v1 import loss_pb2

M = TypeVar("M", bound=Message)
Buffer = bytes | memoryview

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; source: protobuf.dev, "Encoding"
MOST_FIELDS = 64  # a message with more fields is left to protobuf
MOST_VARINT_BYTES, MOST_KEY_BYTES = 10, 5
LARGE_BYTES = 1 << 16  # below this size protobuf is faster than a search for the content
KEY_BYTES = 24  # upper bound on the keys and lengths around a content


class Unreadable(Exception):
    """Bytes that are not a plain sequence of fields."""


@dataclass(frozen=True, slots=True)
class Spliced(Generic[M]):
    """A message and the content that belongs in it, or None if the message is complete."""

    message: M
    content: Buffer | None = None

    def ByteSize(self) -> int:  # noqa: N802  (named as in protobuf)
        """Return the number of bytes on the wire, or at most KEY_BYTES more than that."""
        return self.message.ByteSize() + (0 if self.content is None else len(self.content) + KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Span:
    """The position of one field in bytes: its key begins at start, its value at value, and the field ends at end."""

    number: int
    kind: int
    start: int
    value: int
    end: int


class Splice(Generic[M]):
    """The location of a message type's large content: the bytes field `content` of its message field `owner`.

    Content of less than least_bytes is left to protobuf.
    """

    def __init__(self, kind: type[M], owner: str, content: str, least_bytes: int = LARGE_BYTES) -> None:
        self._kind, self._owner, self._least_bytes = kind, owner, least_bytes
        outer = kind.DESCRIPTOR.fields_by_name[owner]
        assert outer.message_type is not None
        inner = outer.message_type.fields_by_name[content]
        self._outer, self._inner = outer.number, inner.number
        self._outer_rivals, self._inner_rivals = rivals(outer), rivals(inner)
        self._outer_key, self._inner_key = varint(outer.number << 3 | BYTES), varint(inner.number << 3 | BYTES)

    def join(self, spliced: Spliced[M]) -> bytes:
        """Return the bytes of the message with its content, equal to protobuf's except for the order of the fields."""
        if spliced.content is None:
            return spliced.message.SerializeToString()
        rest = self._kind()
        rest.CopyFrom(spliced.message)
        rest.ClearField(self._owner)
        owner = getattr(spliced.message, self._owner).SerializeToString()
        key = self._inner_key + varint(len(spliced.content))
        length = varint(len(owner) + len(key) + len(spliced.content))
        return b"".join((rest.SerializeToString(), self._outer_key, length, owner, key, spliced.content))

    def split(self, content: bytes) -> Spliced[M]:
        """Return the message and, if it is large, its content as a view of the bytes; equal to what protobuf reads.

        Raises:
            google.protobuf.message.DecodeError: protobuf cannot read the bytes.
        """
        outer = inner = None
        try:
            if len(content) >= self._least_bytes:
                outer = self._only(content, 0, len(content), self._outer_rivals, self._outer)
                inner = outer and self._only(content, outer.value, outer.end, self._inner_rivals, self._inner)
        except Unreadable:
            pass  # protobuf reports what is wrong, if anything is
        if not outer or not inner or inner.end - inner.value < self._least_bytes:
            return Spliced(self._kind.FromString(content))
        raw = memoryview(content)
        length = varint(inner.start - outer.value + outer.end - inner.end)
        rest = raw[: outer.start], self._outer_key, length, raw[outer.value : inner.start], raw[inner.end :]
        return Spliced(self._kind.FromString(b"".join(rest)), raw[inner.value : inner.end])

    @staticmethod
    def _only(content: bytes, start: int, end: int, numbers: set[int], number: int) -> Span | None:
        """Return the bytes field `number` if it occurs once and no other field of `numbers` occurs, otherwise None."""
        found = [span for span in fields(content, start, end) if span.number in numbers]
        return found[0] if len(found) == 1 and (found[0].number, found[0].kind) == (number, BYTES) else None


def rivals(field: Any) -> set[int]:
    """Return the field numbers that exclude each other: those of the field's oneof, or only its own."""
    oneof = field.containing_oneof
    return {one.number for one in oneof.fields} if oneof else {field.number}


def fields(content: bytes, start: int, end: int) -> Iterator[Span]:
    """Yield the fields between start and end, in order.

    Raises:
        Unreadable: the bytes are not a plain sequence of fields, or there are more than MOST_FIELDS.
    """
    at = start
    for _ in range(MOST_FIELDS):
        if at == end:
            return
        key, value = read_varint(content, at, min(end, at + MOST_KEY_BYTES))
        kind = key & 7
        if kind == VARINT:
            _, after = read_varint(content, value, end)
        elif kind == BYTES:
            length, value = read_varint(content, value, end)
            after = value + length
        elif kind in (FIXED64, FIXED32):
            after = value + (8 if kind == FIXED64 else 4)
        else:
            raise Unreadable("groups are not read here")
        if after > end:
            raise Unreadable("a field ends beyond its message")
        yield Span(key >> 3, kind, at, value, after)
        at = after
    if at != end:
        raise Unreadable("too many fields")


def read_varint(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return a varint and the position after it.

    Raises:
        Unreadable: the varint does not end before `end`, or has more than MOST_VARINT_BYTES bytes.
    """
    number = 0
    for place in range(min(MOST_VARINT_BYTES, end - start)):
        byte = content[start + place]
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, start + place + 1
    raise Unreadable("a varint has no end")


def varint(number: int) -> bytes:
    """Return a number encoded as a varint."""
    pieces = bytearray()
    while number >= 0x80:
        pieces.append(number & 0x7F | 0x80)
        number >>= 7
    pieces.append(number)
    return bytes(pieces)


LOSS_REQUEST = Splice(loss_pb2.ComputeLossRequest, "hidden", "inline")
LOSS_REPLY = Splice(loss_pb2.ComputeLossResponse, "hidden_grad", "inline")
STREAM_REQUEST = Splice(loss_pb2.StreamLossRequest, "chunk", "content")
STREAM_REPLY = Splice(loss_pb2.StreamLossResponse, "chunk", "content")
