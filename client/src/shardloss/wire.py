"""The codec between NumPy arrays and the contract's Tensor message."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument, NotSupported
from shardloss.v1 import tensor_pb2

Array = NDArray[Any]
Contents = Mapping[Any, bytes | memoryview]  # content outside a message, by chunk id or by the tensor's field

# bfloat16 has no NumPy dtype: arrays hold it as uint16, and the dtype of the message identifies it.
NUMPY_DTYPES: Mapping[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DTYPE_FLOAT64: np.dtype("<f8"),
    tensor_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DTYPE_BFLOAT16: np.dtype("<u2"),
    tensor_pb2.DTYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
}
WIRE_DTYPES: Mapping[str, tensor_pb2.DType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "float64": tensor_pb2.DTYPE_FLOAT64,
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    "int64": tensor_pb2.DTYPE_INT64,
    "int32": tensor_pb2.DTYPE_INT32,
}
NAMES: Mapping[int, str] = {number: name for name, number in WIRE_DTYPES.items()}
MAX_RANK = 8
INT64, UINT64 = range(-(2**63), 2**63), range(2**64)


def integer(value: Any, field: str, within: range = INT64) -> int:
    """Return an integer of Python, NumPy or torch as an int; a boolean is none.

    Raises:
        InvalidArgument: value is not an integer, or is outside the range that the field can hold.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InvalidArgument(f"{field} = {value!r:.80} is not an integer", field=field)
    if number not in within:
        raise InvalidArgument(f"{field} = {number} is outside [{within.start}, {within.stop})", field=field)
    return number


@dataclass(frozen=True, slots=True)
class Encoded:
    """A Tensor message without its storage, and its content: the memory of the array that was encoded."""

    header: tensor_pb2.Tensor
    content: memoryview

    def whole(self) -> tensor_pb2.Tensor:
        """Return the message with its content inline."""
        message = tensor_pb2.Tensor(inline=self.content.tobytes())
        message.MergeFrom(self.header)
        return message


def encode(array: Array, field: str | None = None, *, bfloat16: bool = False) -> tensor_pb2.Tensor:
    """Return an array as an inline Tensor message; arguments are as in `encode_beside`.

    Raises:
        InvalidArgument: the contract does not support the array's dtype.
    """
    return encode_beside(array, field, bfloat16=bfloat16).whole()


def encode_beside(array: Array, field: str | None = None, *, bfloat16: bool = False) -> Encoded:
    """Encode an array, without a copy if it is contiguous; with bfloat16, uint16 holds upper halves of float32 values.

    field is the name of the array in an error.

    Raises:
        InvalidArgument: the contract does not support the array's dtype.
    """
    name = "bfloat16" if bfloat16 else array.dtype.name
    if name not in WIRE_DTYPES or (bfloat16 and array.dtype != np.uint16):
        what = f"{field or 'an array'} is {array.dtype}"
        raise InvalidArgument(f"{what}, which cannot be sent; use one of {', '.join(WIRE_DTYPES)}", field=field)
    dtype = WIRE_DTYPES[name]
    content = np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype]).reshape(-1).view(np.uint8)
    return Encoded(tensor_pb2.Tensor(dtype=dtype, shape=array.shape), content.data)


def num_elements(tensor: tensor_pb2.Tensor, field: str) -> int:
    """Return the number of elements prod(shape) of a tensor.

    Raises:
        InvalidArgument: a size is negative, or there are more than MAX_RANK sizes.
    """
    if len(tensor.shape) > MAX_RANK:
        raise InvalidArgument(f"{field} has rank {len(tensor.shape)}; the limit is {MAX_RANK}", field=field)
    for place, size in enumerate(tensor.shape):
        if size < 0:
            raise InvalidArgument(f"{field}.shape[{place}] = {size} is negative", field=field, index=place)
    return math.prod(tensor.shape)


def expected_bytes(tensor: tensor_pb2.Tensor, field: str) -> int:
    """Return the number of bytes that the storage of a tensor must have.

    Raises:
        InvalidArgument: the dtype is unknown or the shape is invalid.
    """
    if tensor.dtype not in NUMPY_DTYPES:
        raise InvalidArgument(f"{field}.dtype = {tensor.dtype} is not a dtype of the contract", field=field)
    return num_elements(tensor, field) * NUMPY_DTYPES[tensor.dtype].itemsize


def decode(tensor: tensor_pb2.Tensor, field: str, contents: Contents | None = None) -> Array:
    """Return an array that shares the tensor's bytes (bfloat16 as uint16); unaligned bytes are copied.

    contents maps the id of a chunk, or the field of a tensor without storage, to content outside the message.

    Raises:
        InvalidArgument: dtype, shape and number of bytes do not match, or the content is missing.
        NotSupported: the tensor is in shared memory.
    """
    expected = expected_bytes(tensor, field)
    kind = tensor.WhichOneof("storage")
    if kind == "shared_memory":
        raise NotSupported(f"{field}: shared-memory tensors are not yet supported", field=field)
    content: bytes | memoryview
    if kind == "chunk":
        if contents is None or tensor.chunk.id not in contents:
            raise InvalidArgument(f"{field} refers to chunk {tensor.chunk.id}, which did not arrive", field=field)
        content = contents[tensor.chunk.id]
    elif kind is None and contents is not None and field in contents:
        content = contents[field]
    else:
        content = tensor.inline
    if len(content) != expected:
        raise InvalidArgument(
            f"{field} has {len(content)} bytes; {NAMES[tensor.dtype]} {list(tensor.shape)} requires {expected}",
            field=field,
        )
    try:
        array = np.frombuffer(content, NUMPY_DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))
        return array if array.flags.aligned else array.copy()
    except ValueError as error:  # sizes that are too large for NumPy, next to a size of 0
        raise InvalidArgument(f"{field} has shape {list(tensor.shape)}: {error}", field=field) from None


def decode_numbers(tensor: tensor_pb2.Tensor, field: str, contents: Contents | None = None) -> Array:
    """Return the array of a tensor as `decode` does, with bfloat16 widened exactly to float32."""
    array = decode(tensor, field, contents)
    if tensor.dtype == tensor_pb2.DTYPE_BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
