"""Checks of the arguments of TensorFlow's sampler functions, the same as in its kernels."""

from __future__ import annotations

from torch import Tensor

from shardloss.compat.arguments import class_ids
from shardloss.errors import InvalidArgument


def matrix_of(true_classes: object, num_true: int, field: str = "true_classes", *, lists: bool = True) -> Tensor:
    """Return class ids [N, num_true], in any form that TensorFlow accepts, as int64."""
    ids = class_ids(true_classes, field, lists=lists)
    if ids.dim() != 2 or ids.shape[1] != num_true:
        raise InvalidArgument(f"{field} has shape {list(ids.shape)}; [N, num_true = {num_true}] is needed", field=field)
    return ids
