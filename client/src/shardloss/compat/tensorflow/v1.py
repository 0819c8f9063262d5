"""tf.compat.v1.nn: the same functions in TensorFlow 1's argument order; that of the samplers is the same in both."""

from __future__ import annotations

from torch import Tensor

from shardloss.compat.tensorflow import sampled, top_k
from shardloss.compat.tensorflow.samplers import (
    all_candidate_sampler,
    compute_accidental_hits,
    fixed_unigram_candidate_sampler,
    learned_unigram_candidate_sampler,
    log_uniform_candidate_sampler,
    uniform_candidate_sampler,
)
from shardloss.errors import InvalidArgument
from shardloss.table import Table

__all__ = [
    "all_candidate_sampler",
    "compute_accidental_hits",
    "fixed_unigram_candidate_sampler",
    "in_top_k",
    "learned_unigram_candidate_sampler",
    "log_uniform_candidate_sampler",
    "nce_loss",
    "sampled_softmax_loss",
    "uniform_candidate_sampler",
]


def sampled_softmax_loss(
    weights: Table,
    biases: Table | None,
    labels: sampled.Values,
    inputs: sampled.Values,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: sampled.SampledTriple | None = None,
    remove_accidental_hits: bool = True,
    partition_strategy: str = "mod",
    name: str = "sampled_softmax_loss",
    seed: int | None = None,
) -> Tensor:
    """Return the loss of `shardloss.compat.tensorflow.sampled_softmax_loss`.

    partition_strategy must be the table's placement; it has no effect if the table has one shard, as in TensorFlow.

    Raises:
        InvalidArgument: partition_strategy is not the table's, or another argument does not fit.
    """
    check_strategy(weights, partition_strategy)
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


def nce_loss(
    weights: Table,
    biases: Table | None,
    labels: sampled.Values,
    inputs: sampled.Values,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: sampled.SampledTriple | None = None,
    remove_accidental_hits: bool = False,
    partition_strategy: str = "mod",
    name: str = "nce_loss",
) -> Tensor:
    """Return the loss of `shardloss.compat.tensorflow.nce_loss`; partition_strategy is as in `sampled_softmax_loss`."""
    check_strategy(weights, partition_strategy)
    return sampled.nce_loss(
        weights,
        biases,
        labels,
        inputs,
        num_sampled,
        num_classes,
        num_true,
        sampled_values,
        remove_accidental_hits,
        name,
    )


def check_strategy(weights: Table, partition_strategy: str) -> None:
    """Refuse weights that are not a table, and a strategy other than its placement, unless it has a single shard."""
    sampled.check_table(weights)
    spec = weights.spec
    if spec.num_shards > 1 and partition_strategy != spec.placement:
        raise InvalidArgument(
            f"partition_strategy = {partition_strategy!r}, but the table's placement is {spec.placement!r}",
            field="partition_strategy",
        )


def in_top_k(predictions: sampled.Lists, targets: sampled.Lists, k: int, name: str | None = None) -> Tensor:
    """Return the result of `shardloss.compat.tensorflow.in_top_k`; here predictions are the first argument."""
    return top_k.in_top_k(targets, predictions, k, name)
