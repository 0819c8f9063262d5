"""Candidates that include all labels of a batch, as in Paddle's class_center_sample and PartialFC."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardloss.errors import InvalidArgument
from shardloss.sampling.draws import generator


def partial_fc(
    labels: NDArray[np.int64], num_classes: int, num_sampled: int, seed: int, step: int
) -> NDArray[np.int64]:
    """Return min(V, max(S, labels)) ids: the distinct labels ascending, then distinct other classes, drawn uniformly.

    labels may have any shape; those below 0 are padding. The position of a label among the ids is
    `np.searchsorted(np.unique(labels), labels)`. A pure function; costs O(S), or O(V) if S > V / 50. Source: Paddle
    3.3, class_center_sample; An et al., "Partial FC" (2021).

    Raises:
        InvalidArgument: a label is not below num_classes, num_sampled is negative, or seed or step is not an integer in
            [0, 2^64).
    """
    if num_sampled < 0:
        raise InvalidArgument(f"num_sampled = {num_sampled} is negative", field="num_sampled")
    positives = np.unique(labels[labels >= 0])
    if len(positives) and positives[-1] >= num_classes:
        raise InvalidArgument(f"label {positives[-1]} is outside [0, {num_classes})", field="labels")
    # At most len(positives) of these are labels, so enough remain.
    drawn = generator(seed, step).choice(num_classes, size=min(num_classes, num_sampled), replace=False)
    negatives = drawn[~np.isin(drawn, positives)][: max(0, num_sampled - len(positives))]
    return np.concatenate([positives, negatives]).astype(np.int64)
