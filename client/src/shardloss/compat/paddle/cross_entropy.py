"""paddle.nn.functional.softmax_with_cross_entropy and cross_entropy."""

from __future__ import annotations

from torch import Tensor

from shardloss.autograd import check_tensor
from shardloss.compat.arguments import flag, real, truth
from shardloss.compat.paddle import dense, remote
from shardloss.compat.paddle.arguments import (
    Logits,
    check_logits,
    check_reduction,
    class_axis,
    classes_last,
    counted_of,
    hard_labels,
    ignorable,
    reduced,
    soft_labels,
    with_alias,
)
from shardloss.errors import InvalidArgument, NotSupported
from shardloss.lazy import LazyLogits, LazySoftmax


def softmax_with_cross_entropy(
    logits: Logits,
    label: Tensor,
    soft_label: bool = False,
    ignore_index: int = -100,
    numeric_stable_mode: bool = True,  # noqa: ARG001  (accepted, without effect: always stable)
    return_softmax: bool = False,
    axis: int = -1,
) -> Tensor | tuple[Tensor, Tensor | LazySoftmax]:
    """Return the losses, in the logits' shape with size 1 on axis, or (losses, softmax) with return_softmax.

    label contains class ids in the losses' shape, with or without axis; a label equal to ignore_index has loss and
    gradient 0. With soft_label, label has the logits' shape, and ignore_index has no effect.

    Raises:
        InvalidArgument: a tensor does not fit, or a label is not a class.
        NotSupported: the logits are lazy, and axis is not the last one.
    """
    check_logits(logits)
    ignored, place = ignorable(ignore_index), class_axis(logits, axis)
    last = classes_last(logits, place)
    if soft_label is not None and flag(soft_label, "soft_label"):
        losses = soft_losses(last, soft_labels(label, logits, place))
    else:
        losses = hard_losses(last, hard_labels(label, logits, place, ignored), ignored)
    losses = losses.unsqueeze(place)
    if not truth(return_softmax, "return_softmax"):
        return losses
    return losses, LazySoftmax(logits) if isinstance(logits, LazyLogits) else logits.softmax(place)


@with_alias("label", "target")
def cross_entropy(
    input: Logits,
    label: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    soft_label: bool = False,
    axis: int = -1,
    use_softmax: bool = True,
    label_smoothing: float = 0.0,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> Tensor:
    """Return the cross entropy of logits, or of probabilities if use_softmax is False.

    weight [V] multiplies a row's loss by weight[label], or by sum(weight * label) for soft labels. "mean" divides by
    the sum of these factors or, without weight, by the number of rows (if ignore_index >= 0, only of rows that count);
    0 / 0 is 0. "none" returns the label's shape or, for soft or smoothed labels, the input's shape with size 1 on axis.
    label_smoothing e replaces every label by (1 - e) * label + e / V. Source: Paddle 3.3, nn/functional/loss.py.

    Raises:
        InvalidArgument: an argument does not fit, or ignore_index >= 0 with soft or smoothed labels.
        NotSupported: the logits are lazy, and use_softmax is False or axis is not the last one.
    """
    check_logits(input, "input")
    check_reduction(reduction)
    check_tensor(label, "label")
    is_soft = soft_label is not None and flag(soft_label, "soft_label")
    has_softmax = use_softmax is not None and flag(use_softmax, "use_softmax")
    ignored, smoothing = ignorable(ignore_index), real(label_smoothing, "label_smoothing")
    check_options(input, ignored, is_soft, has_softmax, smoothing)
    place = class_axis(input, axis)
    last = classes_last(input, place)
    if is_soft or (smoothing and label.is_floating_point()):
        soft = smoothed(soft_labels(label, input, place), smoothing)
        losses = soft_losses(last, soft, has_softmax)
        factors = None if weight is None else soft.to(weight.dtype) @ class_weights(weight, input, place)
        return reduced(losses, factors, None, reduction, place)
    of_ids = None if smoothing else ignored
    ids = hard_labels(label, input, place, of_ids)
    losses, counted = hard_losses(last, ids, of_ids, smoothing, has_softmax), counted_of(ids, of_ids)
    factors = None if weight is None else label_factors(ids, counted, class_weights(weight, input, place), smoothing)
    num_counted = counted.sum() if ignored >= 0 else None
    keeps_axis = bool(smoothing) or label.dim() == input.dim()
    return reduced(losses, factors, num_counted, reduction, place if keeps_axis else None)


def hard_losses(
    logits: Logits,
    ids: Tensor,
    ignore_index: int | None,
    label_smoothing: float = 0.0,
    use_softmax: bool = True,
) -> Tensor:
    """Return the losses [...] of class ids [...]."""
    if isinstance(logits, LazyLogits):
        return remote.hard_losses(logits, ids, ignore_index, label_smoothing)
    return dense.hard_losses(logits, ids, ignore_index, label_smoothing, use_softmax)


def soft_losses(logits: Logits, label: Tensor, use_softmax: bool = True) -> Tensor:
    """Return the losses [...] of soft labels [..., V]."""
    if isinstance(logits, LazyLogits):
        return remote.soft_losses(logits, label)
    return dense.soft_losses(logits, label, use_softmax)


def check_options(
    logits: Logits, ignore_index: int, soft_label: bool, use_softmax: bool, label_smoothing: float
) -> None:
    """Refuse options that contradict each other."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise InvalidArgument(f"label_smoothing = {label_smoothing} is outside [0, 1]", field="label_smoothing")
    if ignore_index >= 0 and (soft_label or label_smoothing):
        raise InvalidArgument(
            f"ignore_index = {ignore_index} is only for hard labels without smoothing; leave it at -100",
            field="ignore_index",
        )
    if not use_softmax and isinstance(logits, LazyLogits):
        raise NotSupported("use_softmax=False: a table's logits are not probabilities", field="use_softmax")


def smoothed(label: Tensor, label_smoothing: float) -> Tensor:
    """Return (1 - e) * label + e / V for soft labels [..., V], with e = label_smoothing."""
    return (1.0 - label_smoothing) * label + label_smoothing / label.shape[-1] if label_smoothing else label


def class_weights(weight: Tensor, logits: Logits, axis: int) -> Tensor:
    """Return weight [V] on the device of the loss.

    Raises:
        InvalidArgument: weight has a wrong shape, or is not a float tensor.
    """
    check_tensor(weight, "weight")
    if weight.shape != (logits.shape[axis],) or not weight.is_floating_point():
        raise InvalidArgument(
            f"weight is {weight.dtype} {list(weight.shape)}; floats [{logits.shape[axis]}] are needed", field="weight"
        )
    return weight.to(logits.hidden.device if isinstance(logits, LazyLogits) else logits.device)


def label_factors(ids: Tensor, counted: Tensor, weight: Tensor, label_smoothing: float) -> Tensor:
    """Return sum(weight * label) [...] for class ids [...]; 0 for one that is not counted."""
    of_label = weight[ids.where(counted, 0)].where(counted, 0.0)
    return (1.0 - label_smoothing) * of_label + label_smoothing * weight.mean() if label_smoothing else of_label
