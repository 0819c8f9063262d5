"""Arguments in the forms that other frameworks accept, converted to one form; errors name the caller's argument."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from shardloss.autograd import check_sendable
from shardloss.errors import InvalidArgument, LimitExceeded, NotSupported


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Rename fields of the contract in errors to the caller's arguments: names maps the former to the latter."""
    try:
        yield
    except (InvalidArgument, LimitExceeded, NotSupported) as error:
        words = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, names))})(?!\w|\.\w)")
        message = words.sub(lambda found: names[found[0]], error.message)
        field = names.get(error.field or "", error.field)
        raise type(error)(message, **{**error.details, "field": field}) from None


def scalar(value: object) -> object:
    """Return the number in an array or tensor without dimensions, and any other value as it is."""
    return value.item() if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 else value


def integer(value: object, field: str) -> int:
    """Convert an integer of Python, NumPy or torch to int; booleans and floats are refused, as in Paddle."""
    number = scalar(value)
    if not isinstance(number, numbers.Integral) or isinstance(number, bool):
        raise InvalidArgument(f"{field} = {value!r:.80} is not an integer", field=field)
    return int(number)


def whole(value: object, field: str) -> int:
    """Convert a whole number to int: also 5.0 and True, as in TensorFlow, but not 5.5, which TensorFlow cuts to 5."""
    number = scalar(value)
    if isinstance(number, numbers.Integral):
        return int(number)
    if not isinstance(number, numbers.Real) or not float(number).is_integer():
        raise InvalidArgument(f"{field} = {value!r:.80} is not a whole number", field=field)
    return int(float(number))


def real(value: object, field: str) -> float:
    """Convert a number of Python, NumPy or torch to float."""
    number = scalar(value)
    if not isinstance(number, numbers.Real):
        raise InvalidArgument(f"{field} = {value!r:.80} is not a number", field=field)
    return float(number)


def at_least(least: int, value: object, field: str) -> int:
    """Convert a whole number >= least to int."""
    number = whole(value, field)
    if number < least:
        raise InvalidArgument(f"{field} = {number} must be at least {least}", field=field)
    return number


def truth(value: object, field: str) -> bool:
    """Return the truth value of an option, as `if` finds it: None, 0 and [] are false."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidArgument(f"{field} = {value!r:.80} is neither true nor false", field=field) from None


def flag(value: object, field: str) -> bool:
    """Return an option that must be a boolean of Python, NumPy or torch, or 0 or 1."""
    number = scalar(value)
    if not isinstance(number, (numbers.Real, np.bool_)) or number not in (0, 1):
        raise InvalidArgument(f"{field} = {value!r:.80} must be True or False", field=field)
    return bool(number)


def tensor_of(value: object, field: str, *, lists: bool = False) -> Tensor:
    """Return a torch tensor as it is, and a NumPy array (with lists also a list or a number) as a tensor with a copy.

    Raises:
        InvalidArgument: value is none of these, or not an array of real numbers.
        NotSupported: the tensor has no values; see `check_sendable`.
    """
    if isinstance(value, Tensor):
        check_sendable(value, field)
        return value
    is_list = isinstance(value, (Sequence, numbers.Real)) and not isinstance(value, (str, bytes))
    if not isinstance(value, (np.ndarray, np.generic)) and not (lists and is_list):
        needed = "a tensor, an array or a list" if lists else "a torch tensor or a NumPy array"
        raise InvalidArgument(f"{field} is a {type(value).__name__}; {needed} is needed", field=field)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        raise InvalidArgument(f"{field}: its lists have different lengths", field=field) from None
    if array.dtype.kind not in "biuf":
        raise InvalidArgument(f"{field} is an array of {array.dtype}; numbers are needed", field=field)
    native = np.dtype(f"{array.dtype.kind}{min(8, array.dtype.itemsize)}")
    return torch.from_numpy(array.astype(native))


def class_ids(value: object, field: str, *, lists: bool = False) -> Tensor:
    """Return class ids of any real dtype as int64; see `tensor_of`. Floats must be whole numbers.

    Raises:
        InvalidArgument: the ids are not numbers, or one is nan, infinite or not whole; the error names the first.
    """
    tensor = tensor_of(value, field, lists=lists).detach()
    if tensor.is_complex():
        raise InvalidArgument(f"{field} is {tensor.dtype}; class ids must be whole numbers", field=field)
    if tensor.is_floating_point():
        refuse_where((tensor != tensor.trunc()) | (tensor.abs() >= 2.0**63), tensor, field, "is not a class id")
    return tensor.long()


def check_range(ids: Tensor, counted: Tensor | None, num_classes: int, field: str, hint: str = "") -> None:
    """Refuse the first class id that is counted (all are, with None) and outside [0, num_classes)."""
    wrong = (ids < 0) | (ids >= num_classes)
    refuse_where(wrong if counted is None else wrong & counted, ids, field, f"is outside [0, {num_classes}){hint}")


def refuse_where(wrong: Tensor, tensor: Tensor, field: str, complaint: str) -> None:
    """Raise `InvalidArgument` for the first wrong element of a tensor, if there is one."""
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        place, found = ", ".join(map(str, index)), tensor[tuple(index)].item()
        at = f"{field}[{place}]" if index else field
        raise InvalidArgument(f"{at} = {found} {complaint}", field=field, index=place or None)
