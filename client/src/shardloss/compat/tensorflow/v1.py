"""tf.compat.v1.nn.sampled_softmax_loss: the same loss in TensorFlow 1's argument order."""

from __future__ import annotations

from torch import Tensor

from shardloss.compat.tensorflow import sampled
from shardloss.errors import InvalidArgument
from shardloss.table import Table


def sampled_softmax_loss(
    weights: Table,
    biases: Table | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: sampled.SampledTriple | None = None,
    remove_accidental_hits: bool = True,
    partition_strategy: str = "mod",
    name: str = "sampled_softmax_loss",
    seed: int | None = None,
) -> Tensor:
    """As `shardloss.compat.tensorflow.sampled_softmax_loss`.

    partition_strategy must be the table's placement, unless the table has one shard.

    Raises:
        InvalidArgument: partition_strategy is unknown or not the table's, or as in the v2 form.
    """
    spec = weights.spec
    if partition_strategy not in ("div", "mod"):
        raise InvalidArgument(f"partition_strategy = {partition_strategy!r} must be 'div' or 'mod'")
    if spec.num_shards > 1 and partition_strategy != spec.placement:
        raise InvalidArgument(f"partition_strategy = {partition_strategy!r}, but the table is cut {spec.placement!r}")
    return sampled.sampled_softmax_loss(
        weights,
        biases,
        labels,
        inputs,
        num_sampled,
        num_classes,
        num_true,
        sampled_values,
        remove_accidental_hits,
        seed,
        name,
    )
