"""tf.math.in_top_k on dense predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss.autograd import check_tensor
from shardloss.compat.tensorflow.arguments import ids_of, integer
from shardloss.errors import InvalidArgument


def in_top_k(
    targets: Tensor,
    predictions: Tensor,
    k: int,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> Tensor:
    """Return bool [N]: True if fewer than k of a row's predictions [N, C] are above that of its target [N].

    Classes tied at rank k are all in the top k. The result is False for a target outside [0, C), and for a row with a
    prediction that is not finite. name has no effect. Source: TensorFlow 2.21, in_topk_op.h.

    Raises:
        InvalidArgument: predictions are not floats [N, C], targets are not integers [N], or k is not an integer.
    """
    check_tensor(predictions, "predictions")
    check_tensor(targets, "targets")
    if predictions.dim() != 2 or not predictions.is_floating_point():
        raise InvalidArgument(
            f"predictions are {predictions.dtype} {list(predictions.shape)}; floats [N, C] are needed",
            field="predictions",
        )
    if targets.shape != predictions.shape[:1]:
        raise InvalidArgument(
            f"targets has shape {list(targets.shape)}; [N = {len(predictions)}] is needed", field="targets"
        )
    num_in = integer(k, "k")
    ids = torch.from_numpy(ids_of(targets, "targets")).to(predictions.device)
    num_classes = predictions.shape[1]
    can_say = (ids >= 0) & (ids < num_classes) & predictions.isfinite().all(1)
    if not can_say.any():  # C may be 0
        return can_say
    at_target = predictions.gather(1, ids.clamp(0, num_classes - 1)[:, None])
    return can_say & ((predictions > at_target).sum(1) < num_in)
