"""tf.nn.sampled_softmax_loss and tf.nn.nce_loss of TensorFlow 2, and the exact losses to evaluate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from shardloss import types
from shardloss.autograd import to_numpy
from shardloss.compat.arguments import at_least, check_range, class_ids, tensor_of, truth, whole
from shardloss.compat.head import head_of, losses_of
from shardloss.compat.tensorflow.arguments import matrix_of
from shardloss.errors import InvalidArgument
from shardloss.heads import VALUES
from shardloss.table import Table
from shardloss.wire import Array

Values: TypeAlias = Tensor | Array
Lists: TypeAlias = Values | Sequence[float] | Sequence[Sequence[float]] | float
SampledTriple: TypeAlias = Sequence[Lists]  # (sampled [S], true_expected_count [N, T], sampled_expected_count [S])

NAMES = {"hidden": "inputs", "sampler.num_sampled": "num_sampled"}
HINT = ": class ids are zero-based; is there padding or an end-of-text token in the batch?"


def sampled_softmax_loss(
    weights: Table,
    biases: Table | None,
    labels: Values,
    inputs: Values,
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
    ids, hidden = batch_of(weights, biases, labels, inputs, num_classes, num_true)
    loss = types.SampledSoftmax(
        num_sampled=num_sampled_of(num_sampled, weights, sampled_values),
        seed=head_of(weights).seed if seed is None else whole(seed, "seed") % 2**64,
        sampled_values=None if sampled_values is None else values_of(sampled_values, num_sampled, ids),
        remove_accidental_hits=truth(remove_accidental_hits, "remove_accidental_hits"),
        hit_removal="last",
    )
    return losses_of(weights, hidden, ids, loss, NAMES)


def nce_loss(
    weights: Table,
    biases: Table | None,
    labels: Values,
    inputs: Values,
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
    ids, hidden = batch_of(weights, biases, labels, inputs, num_classes, num_true)
    loss = types.SampledLogistic(
        num_sampled=num_sampled_of(num_sampled, weights, sampled_values),
        seed=head_of(weights).seed,
        sampled_values=None if sampled_values is None else values_of(sampled_values, num_sampled, ids),
        remove_accidental_hits=truth(remove_accidental_hits, "remove_accidental_hits"),
        hit_removal="last",
    )
    return losses_of(weights, hidden, ids, loss, NAMES)


def full_sigmoid_loss(weights: Table, biases: Table | None, labels: Values, inputs: Values) -> Tensor:
    """Return the exact logistic loss [N] over all classes, which TensorFlow's docs use to evaluate nce_loss.

    labels are [N] or [N, T]. Equals torch.nn.functional.binary_cross_entropy_with_logits(
    inputs @ W.T + b, one_hot(labels), reduction="none").sum(1); each of T labels has target 1. The loss trains the
    table as `nce_loss` does: to evaluate only, call it under torch.no_grad.

    Raises:
        InvalidArgument: biases do not fit the table, or labels do not fit the inputs.
    """
    ids, hidden = full_batch_of(weights, biases, labels, inputs)
    return losses_of(weights, hidden, ids, types.FullSigmoid(), NAMES)


def full_softmax_loss(weights: Table, biases: Table | None, labels: Values, inputs: Values) -> Tensor:
    """Return the exact softmax loss [N] over all classes, used by TensorFlow's docs to evaluate sampled_softmax_loss.

    labels are [N] or [N, T]. Equals torch.nn.functional.cross_entropy(inputs @ W.T + b, labels, reduction="none"); each
    of T labels has target 1 / T. Everything else is as in `full_sigmoid_loss`.

    Raises:
        InvalidArgument: as in `full_sigmoid_loss`.
    """
    ids, hidden = full_batch_of(weights, biases, labels, inputs)
    return losses_of(weights, hidden, ids, types.FullSoftmax(), NAMES)


def batch_of(
    weights: Table, biases: Table | None, labels: Values, inputs: Values, num_classes: int, num_true: int
) -> tuple[Tensor, Tensor]:
    """Return labels [N, num_true] as int64, and inputs [N, D], after checking that they fit the table."""
    check_biases(weights, biases)
    found = whole(num_classes, "num_classes")
    if found != weights.spec.num_classes:
        raise InvalidArgument(
            f"num_classes = {found}, but the table has {weights.spec.num_classes} classes", field="num_classes"
        )
    ids = matrix_of(labels, at_least(1, num_true, "num_true"), "labels", lists=False)
    check_range(ids, None, found, "labels", HINT)
    hidden = tensor_of(inputs, "inputs")
    if hidden.shape != (len(ids), weights.spec.dim):
        raise InvalidArgument(
            f"inputs has shape {list(hidden.shape)}; [N = {len(ids)}, D = {weights.spec.dim}] is needed", field="inputs"
        )
    return ids, hidden


def full_batch_of(weights: Table, biases: Table | None, labels: Values, inputs: Values) -> tuple[Tensor, Tensor]:
    """Return labels [...] or [..., T] as int64, and inputs [..., D]."""
    check_biases(weights, biases)
    ids = class_ids(labels, "labels")
    check_range(ids, None, weights.spec.num_classes, "labels", HINT)
    return ids, tensor_of(inputs, "inputs")


def num_sampled_of(num_sampled: int, weights: Table, sampled_values: SampledTriple | None) -> int:
    """Return num_sampled as an int; distinct candidates are drawn if there are no sampled_values."""
    found, num_classes = at_least(1, num_sampled, "num_sampled"), weights.spec.num_classes
    if sampled_values is None and found > num_classes:
        raise InvalidArgument(
            f"num_sampled = {found} distinct ids cannot come from {num_classes} classes", field="num_sampled"
        )
    return found


def values_of(sampled_values: SampledTriple, num_sampled: int, labels: Tensor) -> types.SampledValues:
    """Return the caller's draw for labels [N, T]; counts are broadcast as in TensorFlow's subtraction of their logs.

    true_expected_count is broadcast to [N, T] and sampled_expected_count to [S], or, if it has a row for each row of
    labels, to [N, S].
    """
    try:
        members = tuple(sampled_values)
    except TypeError:
        members = ()
    if len(members) != len(VALUES):
        raise InvalidArgument(f"sampled_values must be ({', '.join(VALUES)})", field="sampled_values")
    of_ids, of_true, of_sampled = (f"sampled_values.{name}" for name in VALUES)
    sampled = class_ids(members[0], of_ids, lists=True)
    if list(sampled.shape) != [whole(num_sampled, "num_sampled")]:
        raise InvalidArgument(
            f"num_sampled = {num_sampled}, but {of_ids} has shape {list(sampled.shape)}", field=of_ids
        )
    true_count = broadcast(members[1], of_true, list(labels.shape))
    count = tensor_of(members[2], of_sampled, lists=True)
    is_of_rows = count.dim() == 2 and len(count) != 1
    shape = [len(labels), len(sampled)] if is_of_rows else [len(sampled)]
    count = broadcast(count[0] if count.dim() == 2 and not is_of_rows else count, of_sampled, shape)
    return types.SampledValues(*map(to_numpy, (sampled.expand(count.shape), true_count, count)))


def broadcast(count: Lists, field: str, shape: list[int]) -> Tensor:
    """Return expected counts, broadcast to a shape."""
    tensor = tensor_of(count, field, lists=True)
    try:
        if tensor.is_floating_point():
            return tensor.expand(shape).contiguous()
    except RuntimeError:  # the shapes do not fit
        pass
    raise InvalidArgument(f"{field} is {tensor.dtype} {list(tensor.shape)}; floats {shape} are needed", field=field)


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
