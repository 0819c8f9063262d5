"""tf.nn.sampled_softmax_loss and tf.nn.nce_loss of TensorFlow 2, and the exact losses to evaluate them."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from shardloss import types
from shardloss.autograd import check_sendable, check_tensor, to_numpy
from shardloss.compat.head import SharedHead, head_of
from shardloss.compat.tensorflow.arguments import integer
from shardloss.errors import InvalidArgument
from shardloss.heads import check_values
from shardloss.table import Table

SampledTriple: TypeAlias = tuple[Tensor, Tensor, Tensor]  # (sampled [S], true_expected_count [N, T], sampled_... [S])


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
    """Return the per-example sampled softmax loss [N], differentiable in inputs [N, D].

    weights is the remote table, which `optimizer(weights, lr)` trains; biases is the same table, or None if it has no
    biases. labels are [N, num_true]. Without sampled_values, num_sampled distinct candidates are drawn log-uniformly
    for each step of the optimizer; losses of one step share them. If an accidental hit is repeated, only its last copy
    is removed, as in TensorFlow. With seed None, a seed is drawn from torch's generator once per client and table;
    other seeds are reduced modulo 2^64. name has no effect. Under torch.no_grad the table is not trained.

    Raises:
        InvalidArgument: weights is not a table, or biases, num_classes, num_true or num_sampled do not fit it or the
            tensors.
    """
    check_arguments(weights, biases, labels, inputs, num_classes, num_true)
    head = head_of(weights)
    loss = types.SampledSoftmax(
        num_sampled=num_sampled,
        seed=seed_of(seed, head),
        sampled_values=values_of(sampled_values, num_sampled),
        remove_accidental_hits=remove_accidental_hits,
        hit_removal="last",
    )
    return head.apply_loss(inputs, labels, loss)


def nce_loss(
    weights: Table,
    biases: Table | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: SampledTriple | None = None,
    remove_accidental_hits: bool = False,
    name: str = "nce_loss",  # noqa: ARG001  (accepted, without effect)
) -> Tensor:
    """Return the per-example noise-contrastive estimation loss [N]; the arguments are as in `sampled_softmax_loss`.

    Each true class has target 1 / num_true, each candidate 0. With remove_accidental_hits this is the sampled logistic
    loss.

    Raises:
        InvalidArgument: as in `sampled_softmax_loss`.
    """
    check_arguments(weights, biases, labels, inputs, num_classes, num_true)
    head = head_of(weights)
    loss = types.SampledLogistic(
        num_sampled=num_sampled,
        seed=head.seed,
        sampled_values=values_of(sampled_values, num_sampled),
        remove_accidental_hits=remove_accidental_hits,
        hit_removal="last",
    )
    return head.apply_loss(inputs, labels, loss)


def full_sigmoid_loss(weights: Table, biases: Table | None, labels: Tensor, inputs: Tensor) -> Tensor:
    """Return the exact logistic loss [N] over all classes, which TensorFlow's docs use to evaluate nce_loss.

    labels are [N] or [N, T]. Equals torch.nn.functional.binary_cross_entropy_with_logits(
    inputs @ W.T + b, one_hot(labels), reduction="none").sum(1); each of T labels has target 1. The loss trains the
    table as `nce_loss` does: to evaluate only, call it under torch.no_grad.

    Raises:
        InvalidArgument: biases do not fit the table, or labels do not fit the inputs.
    """
    check_biases(weights, biases)
    return head_of(weights).apply_loss(inputs, labels, types.FullSigmoid())


def full_softmax_loss(weights: Table, biases: Table | None, labels: Tensor, inputs: Tensor) -> Tensor:
    """Return the exact softmax loss [N] over all classes, used by TensorFlow's docs to evaluate sampled_softmax_loss.

    labels are [N] or [N, T]. Equals torch.nn.functional.cross_entropy(inputs @ W.T + b, labels, reduction="none"); each
    of T labels has target 1 / T. Everything else is as in `full_sigmoid_loss`.

    Raises:
        InvalidArgument: as in `full_sigmoid_loss`.
    """
    check_biases(weights, biases)
    return head_of(weights).apply_loss(inputs, labels, types.FullSoftmax())


def values_of(sampled_values: SampledTriple | None, num_sampled: int) -> types.SampledValues | None:
    """Check that the caller's draw is three tensors, the first of them [num_sampled], and return it."""
    if sampled_values is None:
        return None
    check_values(sampled_values)
    if list(sampled_values[0].shape) != [num_sampled]:
        raise InvalidArgument(
            f"num_sampled = {num_sampled}, but sampled_values.sampled has shape {list(sampled_values[0].shape)}",
            field="sampled_values.sampled",
        )
    return types.SampledValues(*map(to_numpy, sampled_values))


def seed_of(seed: int | None, head: SharedHead) -> int:
    """Return seed modulo 2^64, as `CandidateSampler` does, or the head's own seed for None."""
    return head.seed if seed is None else integer(seed, "seed") % 2**64


def check_arguments(
    weights: Table, biases: Table | None, labels: Tensor, inputs: Tensor, num_classes: int, num_true: int
) -> None:
    """Refuse arguments that contradict the table or the tensors."""
    check_biases(weights, biases)
    check_tensor(labels, "labels")
    check_tensor(inputs, "inputs")
    check_sendable(inputs, "inputs")
    if inputs.dim() != 2:
        raise InvalidArgument(
            f"inputs has shape {list(inputs.shape)}; [N, D = {weights.spec.dim}] is needed", field="inputs"
        )
    if num_classes != weights.spec.num_classes:
        raise InvalidArgument(
            f"num_classes = {num_classes}, but the table has {weights.spec.num_classes} classes", field="num_classes"
        )
    if labels.dim() != 2 or labels.shape[1] != num_true:
        raise InvalidArgument(
            f"labels has shape {list(labels.shape)}; [N, num_true = {num_true}] is needed", field="labels"
        )


def check_table(weights: Table) -> None:
    """Refuse weights that are not a table."""
    if not isinstance(weights, Table):
        raise InvalidArgument(
            f"weights is a {type(weights).__name__}; pass a remote table, client.table(name)", field="weights"
        )


def check_biases(weights: Table, biases: Table | None) -> None:
    """Refuse weights that are not a table, and biases that are not those of the table."""
    check_table(weights)
    spec = weights.spec
    if (biases is not None and getattr(biases, "id", None) != weights.id) or (biases is None and spec.bias):
        raise InvalidArgument("biases must be the same table as weights, or None if it has no biases", field="biases")
    if biases is not None and not spec.bias:
        raise InvalidArgument(f"table {spec.name!r} has no biases: pass biases=None", field="biases")
