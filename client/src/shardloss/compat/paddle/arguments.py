"""The steps that Paddle's losses share: checks of arguments, labels in one form (classes last), and reductions."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from shardloss.autograd import check_tensor
from shardloss.compat.head import IGNORED
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.lazy import LazyLogits

Logits: TypeAlias = Tensor | LazyLogits

REDUCTIONS = ("mean", "sum", "none")


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
        NotSupported: group is neither None nor False.
    """
    if group is not None and group is not False:
        raise NotSupported("group: classes are not split over ranks; pass None, and shard the table on the server")


def class_axis(logits: Logits, axis: int) -> int:
    """Return axis as a number >= 0.

    Raises:
        InvalidArgument: axis is out of range.
        NotSupported: the logits are lazy, and axis is not the last one.
    """
    rank = logits.dim()
    if not -rank <= axis < rank:
        raise InvalidArgument(f"axis = {axis} is outside [-{rank}, {rank})", field="axis")
    if isinstance(logits, LazyLogits) and axis % rank != rank - 1:
        raise NotSupported(f"axis = {axis}: the classes of a table's logits are on the last axis; pass axis=-1")
    return axis % rank


def classes_last(logits: Logits, axis: int) -> Logits:
    """Return logits [..., V], with the classes moved from axis >= 0 to the end."""
    return logits if isinstance(logits, LazyLogits) else logits.movedim(axis, -1)


def hard_labels(label: Tensor, logits: Logits, axis: int, ignore_index: int | None = None) -> Tensor:
    """Convert integer labels, in the logits' shape without axis or with size 1 on it, to class ids [...] int64.

    Labels equal to ignore_index become IGNORED; with None, no label is ignored.

    Raises:
        InvalidArgument: label has a wrong shape or dtype, or a label is not a class.
    """
    check_tensor(label, "label")
    shape, num_classes = list(logits.shape), logits.shape[axis]
    kept = [*shape[:axis], 1, *shape[axis + 1 :]]
    without = [*shape[:axis], *shape[axis + 1 :]]
    if list(label.shape) not in (kept, without):
        raise InvalidArgument(f"label has shape {list(label.shape)}; {kept} or {without} is needed", field="label")
    ids = integers(label, "label").to(device_of(logits))
    ids = ids if list(label.shape) == without else ids.squeeze(axis)
    counted = torch.ones_like(ids, dtype=torch.bool) if ignore_index is None else ids != ignore_index
    refuse_ids(counted & ((ids < 0) | (ids >= num_classes)), ids, num_classes, "label")
    return ids.masked_fill(~counted, IGNORED)


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
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidArgument(f"{field} is {tensor.dtype}; class ids must be integers", field=field)
    return tensor.detach().long()


def refuse_ids(wrong: Tensor, ids: Tensor, num_classes: int, field: str) -> None:
    """Raise `InvalidArgument` for the first wrong id, if there is one."""
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        place = ", ".join(map(str, index))
        found = int(ids[tuple(index)])
        raise InvalidArgument(f"{field}[{place}] = {found} is outside [0, {num_classes})", field=field, index=place)


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
