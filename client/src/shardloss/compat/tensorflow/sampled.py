"""The sampled softmax of TensorFlow 2."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from shardloss import types
from shardloss.autograd import SampledSoftmaxHead, to_numpy
from shardloss.errors import InvalidArgument
from shardloss.optimizer import RemoteOptimizer
from shardloss.table import Table

SampledTriple: TypeAlias = tuple[Tensor, Tensor, Tensor]  # (sampled [S], true_expected_count [N, T], sampled_... [S])


def head_of(table: Table) -> SampledSoftmaxHead:
    """The one head through which these functions train a table: the losses of a step share its session."""

    def make() -> SampledSoftmaxHead:
        return table.sampled_softmax(1, reduction="none", ignore_index=None)

    return table.client.attached(__name__, table.name, make, lambda head: shape_of(head.table) == shape_of(table))


def shape_of(table: Table) -> tuple[int, int, str, bool]:
    """What tells a table from another one made anew under its name."""
    spec = table.spec
    return spec.num_classes, spec.dim, spec.dtype, spec.bias


def optimizer(table: Table, lr: float) -> RemoteOptimizer:
    """The torch optimizer of a table that these functions train: step() commits the losses whose backward has run."""
    return head_of(table).optimizer(lr)


def sampled_softmax_loss(
    weights: Table,
    biases: Table | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: SampledTriple | None = None,
    remove_accidental_hits: bool = True,
    seed: int | None = None,
    name: str = "sampled_softmax_loss",  # noqa: ARG001  (accepted, without effect)
) -> Tensor:
    """Per-example sampled softmax loss [N], differentiable in inputs [N, D], and trained by `optimizer(weights, lr)`.

    weights is the remote table; biases is the same table, or None where it has none. labels [N, num_true].
    sampled_values None draws num_sampled distinct candidates log-uniformly, anew for each step of the optimizer; losses
    of one step share them. Only the last of repeated accidental hits is removed, as TensorFlow does. seed None is
    drawn once a client and table from torch's generator. name is without effect. Under torch.no_grad the table is left
    alone.

    Raises:
        InvalidArgument: biases, num_classes, num_true or num_sampled do not fit the table or the tensors.
    """
    check_arguments(weights, biases, labels, num_classes, num_true)
    head = head_of(weights)
    values = None
    if sampled_values is not None:
        values = types.SampledValues(*map(to_numpy, sampled_values))
        if len(values.sampled) != num_sampled:
            raise InvalidArgument(f"num_sampled = {num_sampled} but {len(values.sampled)} sampled values were given")
    loss = types.SampledSoftmax(
        num_sampled=num_sampled,
        seed=head.loss.seed if seed is None else seed,
        sampled_values=values,
        remove_accidental_hits=remove_accidental_hits,
        hit_removal="last",
    )
    return head.apply_loss(inputs, labels, loss)


def check_arguments(weights: Table, biases: Table | None, labels: Tensor, num_classes: int, num_true: int) -> None:
    """Refuse arguments that contradict the table or the labels."""
    spec = weights.spec
    if (biases is not None and biases.name != weights.name) or (biases is None and spec.bias):
        raise InvalidArgument("biases must be the table that weights is, or None where it has no biases")
    if biases is not None and not spec.bias:
        raise InvalidArgument(f"table {spec.name!r} has no biases: pass biases=None")
    if num_classes != spec.num_classes:
        raise InvalidArgument(f"num_classes = {num_classes}, but the table has {spec.num_classes}")
    if labels.dim() != 2 or labels.shape[1] != num_true:
        raise InvalidArgument(f"labels has shape {list(labels.shape)}; [N, num_true = {num_true}] is needed")
