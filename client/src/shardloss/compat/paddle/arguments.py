"""The steps that Paddle's losses share: checks of arguments, labels in one form (classes last), and reductions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from shardloss.autograd import check_tensor
from shardloss.compat.arguments import check_range, class_ids, integer
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.lazy import LazyLogits

Logits: TypeAlias = Tensor | LazyLogits

REDUCTIONS = ("mean", "sum", "none")
INT32 = range(-(2**31), 2**31)  # the values of a Paddle attribute of type int
IGNORABLE = ": class ids are zero-based; to leave labels out, as padding, pass their value as ignore_index (now {})"
R = TypeVar("R")


def with_alias(argument: str, alias: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Return a decorator of a function that also accepts an argument under another name, as in Paddle.

    Raises:
        InvalidArgument: the function is called with both names.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        place = function.__code__.co_varnames.index(argument)

        @wraps(function)
        def call(*args: Any, **options: Any) -> R:
            if alias in options:
                if argument in options or len(args) > place:
                    raise InvalidArgument(f"{alias} is another name of {argument}: pass one of them", field=alias)
                options[argument] = options.pop(alias)
            return function(*args, **options)

        return call

    return decorate


def check_logits(logits: Logits, field: str = "logits") -> None:
    """Check that logits are lazy, or a dense float tensor of rank >= 1.

    Raises:
        InvalidArgument: logits are neither.
    """
    if isinstance(logits, LazyLogits):
        return
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidArgument(
            f"{field} is {what}; a float tensor [..., V], or table.logits(hidden), is needed", field=field
        )


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that Paddle does not know."""
    if reduction not in REDUCTIONS:
        raise InvalidArgument(f"reduction = {reduction!r} must be one of {', '.join(REDUCTIONS)}", field="reduction")


def check_group(group: object) -> None:
    """Refuse a group of ranks: all ranks share one table, and a dense tensor has all classes.

    Raises:
        InvalidArgument: group is neither a group of ranks nor None nor False.
        NotSupported: group is a group of ranks.
    """
    if group is None or group is False:
        return
    if not hasattr(group, "is_member"):  # Paddle's test
        raise InvalidArgument(f"group = {group!r:.80} must be None or False", field="group")
    raise NotSupported(
        "group: classes are not split over ranks; pass None, and shard the table on the server", field="group"
    )


def ignorable(ignore_index: int) -> int:
    """Return ignore_index as an int.

    Raises:
        InvalidArgument: ignore_index is not an integer of 32 bits.
    """
    found = integer(ignore_index, "ignore_index")
    if found not in INT32:
        raise InvalidArgument(f"ignore_index = {found} is outside [-2^31, 2^31)", field="ignore_index")
    return found


def class_axis(logits: Logits, axis: int) -> int:
    """Return axis as a number >= 0.

    Raises:
        InvalidArgument: axis is not an integer, or is out of range.
        NotSupported: the logits are lazy, and axis is not the last one.
    """
    rank, found = logits.dim(), integer(axis, "axis")
    if not -rank <= found < rank:
        raise InvalidArgument(f"axis = {found} is outside [-{rank}, {rank})", field="axis")
    if isinstance(logits, LazyLogits) and found % rank != rank - 1:
        raise NotSupported(
            f"axis = {found}: the classes of a table's logits are on the last axis; pass axis=-1", field="axis"
        )
    return found % rank


def classes_last(logits: Logits, axis: int) -> Logits:
    """Return logits [..., V], with the classes moved from axis >= 0 to the end."""
    return logits if isinstance(logits, LazyLogits) else logits.movedim(axis, -1)


def hard_labels(label: Tensor, logits: Logits, axis: int, ignore_index: int | None = None) -> Tensor:
    """Return labels, in the logits' shape without axis or with size 1 on it, as class ids [...] int64.

    Labels equal to ignore_index are returned as they are; with None, no label is ignored.

    Raises:
        InvalidArgument: label has a wrong shape or dtype, or a label is not a class.
    """
    check_tensor(label, "label")
    shape, num_classes = list(logits.shape), logits.shape[axis]
    kept = [*shape[:axis], 1, *shape[axis + 1 :]]
    without = [*shape[:axis], *shape[axis + 1 :]]
    if list(label.shape) not in (kept, without):
        raise InvalidArgument(f"label has shape {list(label.shape)}; {kept} or {without} is needed", field="label")
    ids = class_ids(label, "label").to(device_of(logits))
    hint = "" if ignore_index is None else IGNORABLE.format(ignore_index)
    check_range(ids, counted_of(ids, ignore_index), num_classes, "label", hint)
    return ids if list(label.shape) == without else ids.squeeze(axis)


def counted_of(ids: Tensor, ignore_index: int | None) -> Tensor:
    """Return a mask of the class ids that count: those other than ignore_index, or all of them with None."""
    return torch.ones_like(ids, dtype=torch.bool) if ignore_index is None else ids != ignore_index


def soft_labels(label: Tensor, logits: Logits, axis: int) -> Tensor:
    """Return the probabilities [..., V] of soft labels, which have the logits' shape and get no gradient.

    Raises:
        InvalidArgument: label has a wrong shape, or is not a float tensor.
    """
    check_tensor(label, "label")
    if label.shape != logits.shape or not label.is_floating_point():
        raise InvalidArgument(
            f"label is {label.dtype} {list(label.shape)}; soft labels must be floats {list(logits.shape)}",
            field="label",
        )
    return label.detach().movedim(axis, -1).to(device_of(logits))


def device_of(logits: Logits) -> torch.device:
    """Return the device of the loss."""
    return logits.hidden.device if isinstance(logits, LazyLogits) else logits.device


def integers(tensor: Tensor, field: str) -> Tensor:
    """Convert an integer tensor to int64.

    Raises:
        InvalidArgument: tensor has a wrong dtype, or is not a tensor.
    """
    check_tensor(tensor, field)
    if tensor.dtype == torch.bool or tensor.is_floating_point():
        raise InvalidArgument(f"{field} is {tensor.dtype}; class ids must be integers", field=field)
    return class_ids(tensor, field)


def reduced(
    losses: Tensor, factors: Tensor | None, num_counted: Tensor | None, reduction: str, axis: int | None
) -> Tensor:
    """Reduce losses [...] times factors [...]; with "none" and an axis, that axis is inserted with size 1."""
    losses = losses if factors is None else losses * factors
    if reduction == "none":
        return losses if axis is None else losses.unsqueeze(axis)
    if reduction == "sum":
        return losses.sum()
    share = num_counted if factors is None else factors.sum()
    if share is None or losses.numel() == 0:
        return losses.mean()
    return losses.sum() / torch.where(share == 0, torch.ones_like(share), share)
