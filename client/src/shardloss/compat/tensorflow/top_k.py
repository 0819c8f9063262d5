"""tf.math.in_top_k on dense predictions."""

from __future__ import annotations

from torch import Tensor

from shardloss.compat.arguments import class_ids, tensor_of, whole
from shardloss.compat.tensorflow.sampled import Lists
from shardloss.errors import InvalidArgument


def in_top_k(
    targets: Lists,
    predictions: Lists,
    k: int,
    name: str | None = None,  # noqa: ARG001  (accepted, without effect)
) -> Tensor:
    """Return bool [N]: True if fewer than k of a row's predictions [N, C] are above that of its target [N].

    Classes tied at rank k are all in the top k. The result is False for a target outside [0, C), and for a row with a
    prediction that is not finite. name has no effect. Source: TensorFlow 2.21, in_topk_op.h.

    Raises:
        InvalidArgument: predictions are not floats [N, C], targets are not class ids [N], or k is not a whole number.
    """
    scores = tensor_of(predictions, "predictions", lists=True)
    scores = scores if isinstance(predictions, Tensor) else scores.float()  # TensorFlow's kernel has float32 alone
    if scores.dim() != 2 or not scores.is_floating_point():
        raise InvalidArgument(
            f"predictions are {scores.dtype} {list(scores.shape)}; floats [N, C] are needed", field="predictions"
        )
    ids = class_ids(targets, "targets", lists=True).to(scores.device)
    if ids.shape != scores.shape[:1]:
        raise InvalidArgument(f"targets has shape {list(ids.shape)}; [N = {len(scores)}] is needed", field="targets")
    num_in = whole(k, "k")
    num_classes = scores.shape[1]
    can_say = (ids >= 0) & (ids < num_classes) & scores.isfinite().all(1)
    if not can_say.any():  # C may be 0
        return can_say
    at_target = scores.gather(1, ids.clamp(0, num_classes - 1)[:, None])
    return can_say & ((scores > at_target).sum(1) < num_in)
