"""A message with its tensor kept outside has the plain message's bytes, and splitting bytes agrees with protobuf."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from shardloss import chunks, wire
from shardloss.errors import InvalidArgument
from shardloss.splice import LARGE_BYTES, LOSS_REPLY, LOSS_REQUEST, STREAM_REQUEST, Splice, Spliced, varint
from shardloss.v1 import loss_pb2, tensor_pb2

SMALL = Splice(loss_pb2.ComputeLossRequest, "hidden", "inline", least_bytes=1)
SMALL_CHUNK = Splice(loss_pb2.StreamLossRequest, "chunk", "content", least_bytes=1)
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def whole(content: bytes = ROWS.tobytes()) -> loss_pb2.ComputeLossRequest:
    """Return a request as protobuf alone would send it."""
    hidden = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[3, 4], inline=content)
    return loss_pb2.ComputeLossRequest(table="t", session="s", step=1 << 40, hidden=hidden, want_hidden_grad=True)


def beside() -> Spliced[loss_pb2.ComputeLossRequest]:
    """Return the same request with its tensor content outside the message."""
    message = whole()
    message.hidden.ClearField("inline")
    return Spliced(message, memoryview(ROWS.tobytes()))


def put_back(spliced: Spliced[loss_pb2.ComputeLossRequest]) -> loss_pb2.ComputeLossRequest:
    if spliced.content is not None:
        assert spliced.message.hidden.WhichOneof("storage") is None
        spliced.message.hidden.inline = bytes(spliced.content)
    return spliced.message


def test_what_is_joined_is_the_plain_message() -> None:
    """The joined bytes parse as the plain message and are no longer than ByteSize() says."""
    content = LOSS_REQUEST.join(beside())
    assert loss_pb2.ComputeLossRequest.FromString(content) == whole()
    assert len(content) <= beside().ByteSize()


@given(st.integers(0, 2**63 - 1), st.binary(max_size=300), st.text(max_size=5))
def test_what_is_split_is_what_was_joined(step: int, content: bytes, name: str) -> None:
    """Bytes written by protobuf or by join() are split into the same request, whatever fields surround the content."""
    request = whole(content)
    request.step, request.table, request.margin.m1 = step, name, 2.0
    assert put_back(SMALL.split(request.SerializeToString())) == request
    found = SMALL.split(SMALL.join(SMALL.split(request.SerializeToString())))
    assert (found.content is None) == (not content)
    assert put_back(found) == request


@given(st.data())
def test_mutated_bytes_are_read_as_protobuf_reads_them(data: st.DataObject) -> None:
    """Mutated bytes give the same message as protobuf, or its DecodeError, and never another error."""
    content = bytearray(whole().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["flip", "drop", "insert", "copy"]))
        if kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "copy":
            end = data.draw(st.integers(place, len(content)))
            content += content[place:end]
        elif place < len(content):
            content[place : place + 1] = b"" if kind == "drop" else bytes([data.draw(st.integers(0, 255))])
    expected = None
    with contextlib.suppress(DecodeError):
        expected = loss_pb2.ComputeLossRequest.FromString(bytes(content))
    if expected is None:
        with pytest.raises(DecodeError):
            SMALL.split(bytes(content))
    else:
        found = put_back(SMALL.split(bytes(content)))
        assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("rival", ["inline", "chunk", "shared_memory"])
def test_a_second_storage_is_left_to_protobuf(rival: str) -> None:
    """If a message has two storages, it is parsed by protobuf, and the last one counts."""
    other = tensor_pb2.Tensor()
    if rival == "inline":
        other.inline = b"abcd"
    else:
        getattr(other, rival).SetInParent()
    after = b"\x32" + varint(other.ByteSize()) + other.SerializeToString()
    content = whole().SerializeToString() + after
    found = SMALL.split(content)
    assert found.content is None
    assert found.message == loss_pb2.ComputeLossRequest.FromString(content)
    assert found.message.hidden.WhichOneof("storage") == rival


@pytest.mark.parametrize("num_bytes", [2, 5, 6, 10])
def test_overlong_keys_are_what_protobuf_says(num_bytes: int) -> None:
    """A field key of up to five bytes is accepted, and a longer one is refused, as in protobuf."""
    hidden = whole().hidden.SerializeToString()
    key = bytes([0xB2, *[0x80] * (num_bytes - 2), 0x00])
    content = key + varint(len(hidden)) + hidden
    if num_bytes <= 5:
        assert put_back(SMALL.split(content)).hidden == whole().hidden
    else:
        with pytest.raises(DecodeError):
            SMALL.split(content)


def test_a_piece_that_is_replaced_by_another_kind_is_left_to_protobuf() -> None:
    """The last member of a oneof counts, and nothing of the member before it remains."""
    chunk = loss_pb2.StreamLossRequest(chunk=tensor_pb2.Chunk(id=0, content=b"abc")).SerializeToString()
    header = loss_pb2.StreamLossRequest(header=whole()).SerializeToString()
    found = SMALL_CHUNK.split(chunk + header)
    assert found == Spliced(loss_pb2.StreamLossRequest(header=whole()))
    with pytest.raises(InvalidArgument):
        chunks.piece_of(found)


def test_many_fields_are_left_to_protobuf() -> None:
    """A message with many fields is parsed by protobuf, because searching millions of them in Python would be slow."""
    content = b"\x18\x01" * 100 + whole().SerializeToString()
    assert SMALL.split(content) == Spliced(loss_pb2.ComputeLossRequest.FromString(content))


def test_what_is_small_stays_inside() -> None:
    """Small content stays inside the message, because copying it takes less time than finding it."""
    assert LOSS_REQUEST.split(whole().SerializeToString()) == Spliced(whole())
    large = whole(bytes(LARGE_BYTES))
    found = LOSS_REQUEST.split(large.SerializeToString())
    assert found.content == bytes(LARGE_BYTES)
    assert put_back(found) == large


def test_a_reply_goes_the_same_way() -> None:
    """A reply whose hidden gradient is kept outside is joined to bytes that protobuf parses."""
    encoded = wire.encode_beside(ROWS)
    reply = loss_pb2.ComputeLossResponse(ticket="t", hidden_grad=encoded.header)
    read = loss_pb2.ComputeLossResponse.FromString(LOSS_REPLY.join(Spliced(reply, encoded.content)))
    np.testing.assert_array_equal(wire.decode(read.hidden_grad, "hidden_grad"), ROWS)


def test_pieces_of_a_stream() -> None:
    """A joined piece parses as a plain chunk, and a piece is read with its content inside or outside the message."""
    message = chunks.spliced(chunks.Piece(3, b"abc"), loss_pb2.StreamLossRequest)
    plain = loss_pb2.StreamLossRequest(chunk=tensor_pb2.Chunk(id=3, content=b"abc"))
    assert loss_pb2.StreamLossRequest.FromString(STREAM_REQUEST.join(message)) == plain
    for codec in (STREAM_REQUEST, SMALL_CHUNK):
        assert chunks.piece_of(codec.split(plain.SerializeToString())) == chunks.Piece(3, b"abc")


def test_content_that_is_not_aligned_is_copied() -> None:
    """Unaligned content is copied, so that NumPy and torch always get aligned memory."""
    encoded = wire.encode_beside(ROWS)
    shifted = memoryview(b"x" + ROWS.tobytes())[1:]
    array = wire.decode(encoded.header, "hidden", {"hidden": shifted})
    assert array.flags.aligned
    np.testing.assert_array_equal(array, ROWS)
