"""Checks of tensors and numbers: shapes, dtypes, ranges. Errors name the field and the first offending index."""

from __future__ import annotations

import math

import torch
from shardloss.errors import InvalidArgument, LimitExceeded
from torch import Tensor

from shardloss_server.config import Limits
from shardloss_server.shard.record import TableSpec

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_SESSION_CHARS = 64


def session(name: str) -> None:
    """Check that a session's name is 1 to 64 printable characters."""
    if not name or len(name) > MAX_SESSION_CHARS or not name.isprintable():
        raise InvalidArgument(f"session must be 1 to {MAX_SESSION_CHARS} printable characters", field="session")


def hidden(tensor: Tensor, spec: TableSpec, limits: Limits, field: str = "hidden") -> None:
    """Check hidden: [N, D] of a float dtype, finite, N within the limits."""
    if tensor.dtype not in FLOATS:
        raise InvalidArgument(f"{field} is {name_of(tensor)}; a float dtype is needed", field=field)
    if tensor.dim() != 2 or tensor.shape[1] != spec.dim:
        raise InvalidArgument(f"{field} has shape {list(tensor.shape)}; [N, {spec.dim}] is needed", field=field)
    if len(tensor) > limits.max_batch:
        raise LimitExceeded(f"{field} has {len(tensor)} rows, above max_batch = {limits.max_batch}", field=field)
    finite(tensor, field, spec)


def class_ids(tensor: Tensor, num_classes: int, field: str, ignore: int | None = None, hint: str = "") -> None:
    """Check that every id of an int64 tensor is in [0, V) or equals ignore."""
    wrong = (tensor < 0) | (tensor >= num_classes)
    if ignore is not None:
        wrong &= tensor != ignore
    if wrong.any():
        index = first_index(wrong)
        raise InvalidArgument(
            f"{field}[{show(index)}] = {int(tensor[tuple(index)])} is outside [0, {num_classes}){hint}",
            field=field,
            index=show(index),
        )


def id_list(tensor: Tensor, num_classes: int) -> None:
    """Check class_ids: [M], each in [0, V)."""
    if tensor.dim() != 1:
        raise InvalidArgument(f"class_ids has shape {list(tensor.shape)}; [M] is needed", field="class_ids")
    class_ids(tensor, num_classes, "class_ids")


def refuse_if(wrong: bool, complaint: str, field: str) -> None:
    """Raise `InvalidArgument` with the complaint if wrong is True."""
    if wrong:
        raise InvalidArgument(f"{field}: {complaint}", field=field)


def in_range(value: float, field: str, least: float, most: float) -> None:
    """Check that least <= value <= most."""
    if not least <= value <= most:
        raise InvalidArgument(f"{field} = {value} is outside [{least}, {most}]", field=field)


def answered_bytes(num_bytes: int, field: str, limits: Limits) -> None:
    """Check that the answers of all shards together stay within four times max_reply_bytes."""
    most = 4 * limits.max_reply_bytes
    if num_bytes > most:
        raise LimitExceeded(
            f"{field} makes the shards return {num_bytes} bytes, above {most}; split the request", field=field
        )


def finite_logits(is_finite: Tensor, field: str, place: int | None = None) -> None:
    """Check that no row's logits overflow: is_finite [N, ...] is True throughout.

    The error names the first row that is not finite, or place if that is given.

    Raises:
        InvalidArgument: the product of hidden and a row of the table is not finite.
    """
    if not is_finite.all():
        row = first_index(~is_finite)[0] if place is None else place
        raise InvalidArgument(
            f"{field}[{row}] has logits that are not finite: it, or a row of the table, is too large",
            field=field,
            index=row,
        )


def width_of(spec: TableSpec) -> int:
    """Return the bytes of one element in the table's compute dtype."""
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    return dtype.itemsize


def vector(field: str, tensor: Tensor, num_rows: int | None, spec: TableSpec | None = None) -> None:
    """Check a vector: [N] floats, finite; N is num_rows unless that is None."""
    if tensor.dtype not in FLOATS or tensor.dim() != 1 or (num_rows is not None and len(tensor) != num_rows):
        shape = f"[{'N' if num_rows is None else num_rows}]"
        raise InvalidArgument(
            f"{field} is {name_of(tensor)} {list(tensor.shape)}; floats {shape} are needed", field=field
        )
    finite(tensor, field, spec)


def finite(tensor: Tensor, field: str, spec: TableSpec | None = None) -> None:
    """Check that a tensor has no NaN or Inf; with a spec, also in the table's compute dtype."""
    if spec is not None:
        tensor = tensor.to(getattr(torch, spec.compute_dtype))
    if not all_finite(tensor):
        refuse_where(~torch.isfinite(tensor), tensor, field, "is not finite")


def all_finite(tensor: Tensor) -> bool:
    """Return True if the sum of all elements is finite, which implies that each element is.

    False may mean that only the sum overflows. This takes a tenth of the time of checking each element.
    """
    return bool(torch.isfinite(tensor.sum()))


def refuse_where(wrong: Tensor, tensor: Tensor, field: str, complaint: str) -> None:
    """Refuse a tensor with any wrong entry; the error names the first."""
    if wrong.any():
        index = first_index(wrong)
        value = float(tensor[tuple(index)])
        raise InvalidArgument(f"{field}[{show(index)}] = {value} {complaint}", field=field, index=show(index))


def rate(value: float, field: str, spec: TableSpec) -> None:
    """Check that a learning rate is not negative, and finite in the table's compute dtype."""
    if not 0 <= value <= torch.finfo(getattr(torch, spec.compute_dtype)).max:
        raise InvalidArgument(f"{field} = {value} must be finite and >= 0", field=field)


def finite_number(value: float, field: str) -> None:
    """Check that a number is neither NaN nor Inf."""
    if not math.isfinite(value):
        raise InvalidArgument(f"{field} = {value} must be finite", field=field)


def at_least(value: int, least: int, field: str) -> None:
    """Check that an integer is not below its least value."""
    if value < least:
        raise InvalidArgument(f"{field} = {value} must be at least {least}", field=field)


def first_index(wrong: Tensor) -> list[int]:
    """Return the index of the first True in row-major order."""
    return [int(i) for i in torch.nonzero(wrong)[0]]


def show(index: list[int]) -> str:
    """Return an index as it is written between brackets: "17, 0"."""
    return ", ".join(map(str, index))


def name_of(tensor: Tensor) -> str:
    """Return a tensor's dtype without the module: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
