"""The k best columns of each row: by key descending, then by class id ascending."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Best:
    """The k best of some classes, by key descending and then id ascending; each tensor is [N, <= k].

    logits belong to the keys; if the keys are logits themselves, as for hard negatives, this field has log weights.
    """

    class_ids: Tensor
    keys: Tensor
    logits: Tensor


def best(class_ids: Tensor, keys: Tensor, logits: Tensor, k: int) -> Best:
    """Return the min(k, R) best of class_ids [R] (ascending) by keys [N, R]."""
    k = min(k, len(class_ids))
    if k == 0:
        return Best(class_ids.new_zeros(len(keys), 0), keys[:, :0], logits[:, :0])
    border = torch.topk(keys, k, dim=1).values[:, -1:]
    above, tied = keys > border, keys == border
    room = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= room))
    column = torch.nonzero(chosen)[:, 1].view(len(keys), k)
    return ordered(Best(class_ids[column], keys.gather(1, column), logits.gather(1, column)), k)


def ordered(found: Best, k: int) -> Best:
    """Return the first k of [N, M] candidates by key descending, then id ascending."""
    by_id = torch.argsort(found.class_ids, dim=1)
    by_key = torch.argsort(found.keys.gather(1, by_id), dim=1, descending=True, stable=True)[:, :k]
    place = by_id.gather(1, by_key)
    return Best(found.class_ids.gather(1, place), found.keys.gather(1, place), found.logits.gather(1, place))


def beside(a: Best, b: Best) -> Best:
    """Concatenate two sets of candidates, [N, a] and [N, b], into [N, a + b]."""
    columns = zip((a.class_ids, a.keys, a.logits), (b.class_ids, b.keys, b.logits), strict=True)
    return Best(*(torch.cat(pair, dim=1) for pair in columns))
