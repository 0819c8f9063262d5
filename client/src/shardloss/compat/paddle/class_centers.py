"""paddle.nn.functional.class_center_sample: the classes that PartialFC samples for a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shardloss.autograd import check_tensor, fresh_seed, to_numpy
from shardloss.compat.arguments import check_range, integer
from shardloss.compat.paddle.arguments import check_group, integers
from shardloss.errors import InvalidArgument
from shardloss.sampling import partial_fc


def class_center_sample(
    label: Tensor, num_classes: int, num_samples: int, group: object = None
) -> tuple[Tensor, Tensor]:
    """Return (remapped_label [N], sampled_class_center [S]): label positions in the sampled classes, and those classes.

    The sampled classes are the distinct labels in ascending order, then uniform distinct classes that are not labels:
    num_samples in total, or more if there are more distinct labels. The seed is from torch's generator. group must be
    None or False.

    Raises:
        InvalidArgument: label is not [N >= 1] of classes, or num_samples is outside [1, num_classes].
        NotSupported: group is a group of ranks.
    """
    check_group(group)
    check_tensor(label, "label")
    if label.dim() != 1 or len(label) == 0:
        raise InvalidArgument(f"label has shape {list(label.shape)}; [N] with N >= 1 is needed", field="label")
    classes, samples = integer(num_classes, "num_classes"), integer(num_samples, "num_samples")
    if not 1 <= samples <= classes:
        raise InvalidArgument(f"num_samples = {samples} is outside [1, {classes}]", field="num_samples")
    ids = integers(label, "label")
    check_range(ids, None, classes, "label")
    labels = to_numpy(ids)
    centers = partial_fc(labels, classes, samples, fresh_seed(), 0)
    remapped = np.searchsorted(np.unique(labels), labels)
    return torch.from_numpy(remapped).to(label), torch.from_numpy(centers).to(label)
