"""paddle.fluid.layers.sampled_softmax_with_cross_entropy, which was removed in Paddle 3."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss import sampling, types
from shardloss.autograd import check_tensor, fresh_seed, to_numpy
from shardloss.compat.arguments import check_range, flag, integer, refuse_where
from shardloss.compat.head import head_of
from shardloss.compat.paddle import remote
from shardloss.compat.paddle.arguments import Logits, check_logits, device_of, integers
from shardloss.errors import InvalidArgument
from shardloss.lazy import LazyLogits

Columns = tuple[Tensor, Tensor]  # samples [N, T + S] int64, the labels first, and Q of each


def sampled_softmax_with_cross_entropy(
    logits: Logits,
    label: Tensor,
    num_samples: int,
    num_true: int = 1,
    remove_accidental_hits: bool = True,
    use_customized_samples: bool = False,
    customized_samples: Tensor | None = None,
    customized_probabilities: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Return sampled softmax losses [N, 1] of logits [N, V] and label [N, num_true], each with target 1 / num_true.

    The columns are the labels and num_samples sampled classes, each logit corrected by -log Q. Every copy of a sampled
    class that is a label of its row is removed, unless remove_accidental_hits is False. With use_customized_samples,
    the columns are customized_samples [N, num_true + num_samples], each row's labels first, and their Q is
    customized_probabilities; otherwise the samples are distinct, log-uniform and shared by the batch. seed 0 is random,
    from torch's generator. With any other seed, dense logits get the same draw on each call; lazy logits get a new draw
    for each step of the optimizer, the same on each run.

    Raises:
        InvalidArgument: an argument does not fit.
    """
    check_logits(logits)
    seed, num_samples = integer(seed, "seed"), integer(num_samples, "num_samples")
    if not 0 <= seed < 2**64:
        raise InvalidArgument(f"seed = {seed} is outside [0, 2^64)", field="seed")
    removes_hits = flag(remove_accidental_hits, "remove_accidental_hits")
    labels = labels_of(logits, label, integer(num_true, "num_true"))
    columns = None
    if flag(use_customized_samples, "use_customized_samples"):
        columns = customized(labels, customized_samples, customized_probabilities, num_samples, logits.shape[1])
    if columns is None and not 1 <= num_samples <= logits.shape[1]:
        raise InvalidArgument(f"num_samples = {num_samples} is outside [1, {logits.shape[1]}]", field="num_samples")
    if isinstance(logits, LazyLogits):
        return remote_losses(logits, labels, num_samples, removes_hits, columns, seed)[:, None]
    if columns is None:
        columns = drawn(labels, logits.shape[1], num_samples, seed or fresh_seed())
    return dense_losses(logits, columns, labels.shape[1], removes_hits)[:, None]


def labels_of(logits: Logits, label: Tensor, num_true: int) -> Tensor:
    """Return label [N, num_true] of logits [N, V] as int64."""
    check_tensor(label, "label")
    if logits.dim() != 2 or list(label.shape) != [logits.shape[0], num_true] or num_true < 1:
        raise InvalidArgument(
            f"logits {list(logits.shape)} and label {list(label.shape)}; [N, V] and [N, num_true = {num_true}] "
            "are needed",
            field="label",
        )
    ids = integers(label, "label").to(device_of(logits))
    check_range(ids, None, logits.shape[1], "label")
    return ids


def customized(
    labels: Tensor, samples: Tensor | None, probabilities: Tensor | None, num_samples: int, num_classes: int
) -> Columns:
    """Check the caller's columns and return them.

    Raises:
        InvalidArgument: a tensor is missing or has a wrong shape, a row of samples does not begin with its labels or
            has an id that is not a class, or Q is not finite and positive.
    """
    if samples is None or probabilities is None:
        missing = "customized_samples" if samples is None else "customized_probabilities"
        raise InvalidArgument(f"use_customized_samples needs {missing}", field=missing)
    shape = [len(labels), labels.shape[1] + num_samples]
    for tensor, field in ((samples, "customized_samples"), (probabilities, "customized_probabilities")):
        check_tensor(tensor, field)
        if list(tensor.shape) != shape:
            raise InvalidArgument(f"{field} has shape {list(tensor.shape)}; {shape} is needed", field=field)
    ids = integers(samples, "customized_samples").to(labels.device)
    check_range(ids, None, num_classes, "customized_samples")
    if not torch.equal(ids[:, : labels.shape[1]], labels):
        raise InvalidArgument("each row of customized_samples must begin with its labels", field="customized_samples")
    check_probabilities(probabilities)
    return ids, probabilities.detach().to(labels.device)


def check_probabilities(probabilities: Tensor) -> None:
    """Raise `InvalidArgument` if an expected count [N, num_true + num_samples] is not finite and positive."""
    field = "customized_probabilities"
    if not probabilities.is_floating_point():
        raise InvalidArgument(f"{field} is {probabilities.dtype}; floats are needed", field=field)
    wrong = ~(torch.isfinite(probabilities) & (probabilities > 0))
    refuse_where(wrong, probabilities, field, "must be finite and > 0")


def remote_losses(
    logits: LazyLogits, labels: Tensor, num_samples: int, remove_hits: bool, columns: Columns | None, seed: int
) -> Tensor:
    """Return the losses [N] that the service computes; without columns, it draws the samples."""
    values = None
    if columns is not None:
        num_true = labels.shape[1]
        ids, counts = to_numpy(columns[0]), to_numpy(columns[1])
        values = types.SampledValues(ids[:, num_true:], counts[:, :num_true], counts[:, num_true:])
    loss = types.SampledSoftmax(
        num_sampled=num_samples,
        seed=seed or head_of(logits.table).seed,
        sampled_values=values,
        remove_accidental_hits=remove_hits,
        logits=logits.transform,
    )
    return remote.losses_of(logits, labels, loss)


def drawn(labels: Tensor, num_classes: int, num_samples: int, seed: int) -> Columns:
    """Draw distinct log-uniform samples [S]; return them after each row's labels, and the expected counts of both.

    Raises:
        InvalidArgument: num_samples is so close to V that not enough distinct classes are found.
    """
    distribution = sampling.log_uniform(num_classes)
    try:
        draw = sampling.draw(distribution, num_samples, True, seed, 0)
    except sampling.TriesExhausted:
        raise InvalidArgument(
            f"num_samples = {num_samples} distinct classes cannot be found among {num_classes}; draw fewer",
            field="num_samples",
        ) from None
    shared = torch.from_numpy(draw.sampled).to(labels.device).expand(len(labels), -1)
    ids = torch.cat([labels, shared], 1)
    counts = sampling.expected_count(distribution, to_numpy(ids), num_samples, True, draw.num_tries)
    return ids, torch.from_numpy(counts).to(labels.device)


def dense_losses(logits: Tensor, columns: Columns, num_true: int, remove_hits: bool) -> Tensor:
    """Return losses [N] computed by torch: -mean(log_softmax(z)[:, :T]), z = logits at samples - log Q, hits -inf."""
    ids, counts = columns
    corrected = logits.gather(1, ids) - counts.log().to(logits.dtype)
    if remove_hits:
        is_hit = (ids[:, :, None] == ids[:, None, :num_true]).any(2)
        is_hit[:, :num_true] = False
        corrected = corrected.masked_fill(is_hit, float("-inf"))
    return -corrected.log_softmax(1)[:, :num_true].mean(1)
