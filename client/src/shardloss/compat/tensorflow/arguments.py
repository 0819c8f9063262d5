"""Checks of the arguments of TensorFlow's sampler functions, the same as in its kernels."""

from __future__ import annotations

import operator
from collections.abc import Hashable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardloss.autograd import check_tensor
from shardloss.errors import InvalidArgument


def plain(attribute: object) -> Hashable:
    """Return an attribute as a hashable value: a Python, NumPy or torch number, a list (as a tuple), or text.

    Raises:
        InvalidArgument: the attribute is not a number, text or a flat list.
    """
    value = attribute.tolist() if isinstance(attribute, (Tensor, np.ndarray, np.generic)) else attribute
    key = tuple(value) if isinstance(value, list) else value
    try:
        hash(key)
    except TypeError:
        raise InvalidArgument(f"{attribute!r:.80} is not a number, text or a flat list of numbers") from None
    return key


def integer(value: int, field: str) -> int:
    """Convert a Python or NumPy integer, or an integer tensor, to int."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{field} = {value!r} is not an integer", field=field) from None


def real(value: float, field: str) -> float:
    """Convert a Python or NumPy number, or a tensor, to float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{field} = {value!r} is not a number", field=field) from None


def at_least(least: int, value: int, field: str) -> int:
    """Return value as an int; it must be at least `least`."""
    if integer(value, field) < least:
        raise InvalidArgument(f"{field} = {value} must be at least {least}", field=field)
    return integer(value, field)


def classes_of(true_classes: Tensor, num_true: int, num_classes: int) -> NDArray[np.int64]:
    """Return true_classes [N, num_true] as an array; all ids must be in [0, num_classes)."""
    ids = matrix_of(true_classes, num_true)
    wrong = (ids < 0) | (ids >= num_classes)
    if wrong.any():
        row, column = (int(at[0]) for at in wrong.nonzero())
        raise InvalidArgument(
            f"true_classes[{row}, {column}] = {ids[row, column]} is outside [0, {num_classes})",
            field="true_classes",
            index=f"{row}, {column}",
        )
    return ids


def matrix_of(true_classes: Tensor, num_true: int) -> NDArray[np.int64]:
    """Return true_classes [N, num_true], an integer tensor on any device, as an array."""
    check_tensor(true_classes, "true_classes")
    if true_classes.dim() != 2 or true_classes.shape[1] != num_true:
        raise InvalidArgument(
            f"true_classes has shape {list(true_classes.shape)}; [N, num_true = {num_true}] is needed",
            field="true_classes",
        )
    return ids_of(true_classes, "true_classes")


def ids_of(tensor: Tensor, field: str) -> NDArray[np.int64]:
    """Convert an integer tensor on any device to an int64 array."""
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidArgument(f"{field} is {tensor.dtype}; class ids must be integers", field=field)
    return tensor.detach().to("cpu", torch.int64).numpy()
