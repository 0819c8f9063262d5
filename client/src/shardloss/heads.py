"""Heads: torch modules over a remote table, called like a local loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from shardloss import types, wire
from shardloss.autograd import (
    FLOAT_DTYPES,
    Mark,
    RemoteLoss,
    check_tensor,
    num_true_of,
    to_ids,
    to_numpy,
    to_torch,
    to_wire,
)
from shardloss.errors import BadReply, InvalidArgument
from shardloss.optimizer import Part, Pending, RemoteOptimizer
from shardloss.table import Table

REDUCTIONS = ("mean", "sum", "none")
F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """A function that torch.compile runs as it is, between compiled graphs: an RPC cannot be traced."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Head(torch.nn.Module):
    """A loss over a remote table: head(hidden, labels) -> loss.

    hidden [..., D] on any device in float32, float64, float16 or bfloat16; labels [...] one class a row, or [..., T]
    for T true classes, int64 or int32. The loss is of float32 (float64 for a float64 table), [...] with reduction
    "none". As in torch, "mean" divides by the number of rows with a label other than ignore_index, and is nan where
    there is none.

    Each call in training mode with gradients enabled is a part of the present step; `optimizer(lr)` gives the torch
    optimizer whose step() commits those whose backward has run, and gives the others up. In eval mode or under no_grad
    a call leaves the table alone. zero_grad() of the optimizer gives up a step none of whose losses waits for its
    backward: backward of one of them again (retain_graph=True) cannot be committed any more. With a learning_rate of
    its own the head commits in backward, for plain loops of one loss a step. copy.deepcopy gives a head of the same
    table with steps of its own. torch.compile runs it as it is, between compiled graphs. Not thread-safe.

    wire_dtype, None until it is set, is what hidden and its gradient cross the wire in: torch.bfloat16 or torch.float16
    halve what float32 hidden carries, rounded once on each way. A loss's gradient is rounded before it is multiplied by
    any upstream: float16 makes 0 of what is below 6e-8 then, and refuses what is above 65,504.

    Raises:
        InvalidArgument: a tensor does not fit; hidden that overflowed to inf is refused, not passed on as nan.
        ShardlossError: whatever the service answers, see docs/errors.md.
    """

    def __init__(self, table: Table, *, reduction: str, ignore_index: int | None, learning_rate: float | None) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InvalidArgument(f"reduction = {reduction!r} must be one of {', '.join(REDUCTIONS)}")
        self.table, self.reduction, self.ignore_index = table, reduction, ignore_index
        self.pending = Pending(table.session(), learning_rate)
        self.wire_dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Head:
        twin: Head = type(self).__new__(type(self))
        twin.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        twin.pending = Pending(self.table.session(), self.pending.learning_rate)
        return twin

    def optimizer(self, lr: float, *, overlap: bool = False) -> RemoteOptimizer:
        """The optimizer of the remote table: step() commits, zero_grad() drops what was not committed.

        With overlap step() does not wait: the table takes the step while the trainer goes on.
        """
        return RemoteOptimizer(self.pending, lr, overlap)

    def extra_repr(self) -> str:
        """The table in repr(head)."""
        spec = self.table.spec
        return f"table={spec.name!r}, num_classes={spec.num_classes}, dim={spec.dim}, reduction={self.reduction!r}"

    @uncompiled
    def apply_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss: types.Loss,
        label_weights: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Flatten, compute, reduce. A scale of one element multiplies the loss's own and gets its gradient."""
        check_tensor(hidden, "hidden")
        if hidden.dim() == 0:
            raise InvalidArgument("hidden is a scalar; [..., D] is needed", field="hidden")
        batch_shape, num_true = hidden.shape[:-1], num_true_of(hidden, labels)
        num_rows = batch_shape.numel()
        if label_weights is not None:
            check_tensor(label_weights, "label_weights")
            if label_weights.shape != labels.shape:
                raise InvalidArgument(
                    f"label_weights {list(label_weights.shape)} do not fit labels {list(labels.shape)}",
                    field="label_weights",
                )
        flat_labels = labels.reshape(num_rows, num_true)
        flat_weights = None if label_weights is None else label_weights.reshape(num_rows, num_true)
        losses = self._losses(hidden.reshape(num_rows, hidden.shape[-1]), flat_labels, loss, flat_weights, scale)
        if self.reduction == "none":
            return losses.view(batch_shape)
        if self.reduction == "sum":
            return losses.sum()
        return mean_of(losses, self.num_counted(flat_labels, flat_weights))

    def _losses(
        self, hidden: Tensor, labels: Tensor, kind: types.Loss, weights: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        differentiable = torch.is_grad_enabled()
        training = differentiable and self.training
        if not training:
            self.pending.join()
        step = self.pending.session.step
        compute = self.pending.compute_loss if training else partial(self.table.compute_loss, step=step)
        result = compute(
            to_wire(self._sent(hidden), "hidden"),
            to_ids(labels),
            kind if scale is None else scaled(kind, scale),
            label_weights=None if weights is None else to_wire(weights, "label_weights"),
            ignore_index=self.ignore_index,
            want_hidden_grad=differentiable and hidden.requires_grad,
            want_scale_grad=differentiable and scale is not None and scale.requires_grad,
            grad_dtype=self._grad_dtype,
        )
        part = self.pending.part(result.ticket) if training else None
        return self._attached(hidden, scale, result, kind, part)

    @uncompiled
    def apply_distribution(
        self, hidden: Tensor, labels: Tensor, loss: types.FullSoftmax, scale: Tensor | None = None
    ) -> Tensor:
        """As `apply_loss` of labels [..., V] that are weights of all classes: a step of their own."""
        num_classes = self.table.spec.num_classes
        if hidden.dim() == 0 or labels.shape != (*hidden.shape[:-1], num_classes):
            raise InvalidArgument(
                f"labels {list(labels.shape)} are floats: a distribution [..., {num_classes}] beside hidden "
                f"{list(hidden.shape)} is needed",
                field="labels",
            )
        batch_shape = hidden.shape[:-1]
        rows, distribution = hidden.reshape(-1, hidden.shape[-1]), to_numpy(labels.reshape(-1, num_classes))
        losses = self._distribution_losses(rows, distribution, loss, scale)
        if self.reduction == "none":
            return losses.view(batch_shape)
        return losses.sum() if self.reduction == "sum" else mean_of(losses, len(rows))

    def _distribution_losses(
        self, hidden: Tensor, distribution: wire.Array, loss: types.FullSoftmax, scale: Tensor | None
    ) -> Tensor:
        differentiable = torch.is_grad_enabled()
        training = differentiable and self.training
        self.pending.join()
        sent = self._sent(hidden)
        if training:  # the step sends both again: the caller's batch may have changed by then
            distribution, sent = distribution.copy(), sent.clone() if sent is hidden else sent
        kind, kept = loss if scale is None else scaled(loss, scale), to_wire(sent, "hidden")
        result = self.table.compute_loss(
            kept,
            None,
            kind,
            label_distribution=distribution,
            want_hidden_grad=differentiable and hidden.requires_grad,
            want_scale_grad=differentiable and scale is not None and scale.requires_grad,
            grad_dtype=self._grad_dtype,
        )

        def step(g: wire.Array, learning_rate: float, grad_scale: float) -> None:
            self.pending.session.train_step(
                kept,
                None,
                kind,
                learning_rate=learning_rate,
                grad_scale=grad_scale,
                upstream=g,
                label_distribution=distribution,
                want_hidden_grad=False,
            )

        part = self.pending.part("", step) if training else None
        return self._attached(hidden, scale, result, loss, part)

    def _sent(self, hidden: Tensor) -> Tensor:
        """Hidden as it crosses the wire.

        Raises:
            InvalidArgument: it, or wire_dtype, is of no float dtype of the contract.
        """
        if self.wire_dtype is None:
            return hidden
        for dtype, field in ((hidden.dtype, "hidden"), (self.wire_dtype, "wire_dtype")):
            if dtype not in FLOAT_DTYPES:
                raise InvalidArgument(f"{field} is {dtype!r}; one of {FLOAT_DTYPES} is needed", field=field)
        return hidden.to(self.wire_dtype)

    @property
    def _grad_dtype(self) -> str | None:
        """The name of wire_dtype."""
        return None if self.wire_dtype is None else str(self.wire_dtype).removeprefix("torch.")

    def _attached(
        self, hidden: Tensor, scale: Tensor | None, result: types.LossResult, kind: types.Loss, part: Part | None
    ) -> Tensor:
        """The losses [N] of a reply, in the graph of hidden [N, D] and scale; part None leaves the table alone."""
        differentiable = torch.is_grad_enabled()
        lacks_grad = differentiable and hidden.requires_grad and result.hidden_grad is None
        lacks_scale = differentiable and scale is not None and scale.requires_grad and result.scale_grad is None
        if result.loss is None or lacks_grad or lacks_scale:
            raise BadReply("the reply lacks the loss or the gradient that was asked for")
        loss, mark = to_torch(result.loss), None
        if part is not None:
            mark = Mark.apply(self.pending.probe, self.pending, part, loss)  # type: ignore[no-untyped-call]
        scale_grad = None if result.scale_grad is None else result.scale_grad * kind.logits.scale
        inputs = (hidden, mark, scale, loss, result.hidden_grad, scale_grad)
        return cast(Tensor, RemoteLoss.apply(*inputs))  # type: ignore[no-untyped-call]

    def num_counted(self, labels: Tensor, label_weights: Tensor | None) -> float:  # noqa: ARG002  (heads differ)
        """What "mean" divides the losses of labels [N, T] by."""
        if self.ignore_index is None:
            return len(labels)
        return int((labels != self.ignore_index).any(1).sum())


def scaled(loss: types.Loss, scale: Tensor) -> types.Loss:
    """The loss with its scale multiplied by a tensor of one element.

    Raises:
        InvalidArgument: it has more, or is no tensor.
    """
    check_tensor(scale, "scale")
    if scale.numel() != 1:
        raise InvalidArgument(f"scale has shape {list(scale.shape)}; one element is needed", field="scale")
    logits = replace(loss.logits, scale=loss.logits.scale * float(scale.detach()))
    return replace(loss, logits=logits)


def mean_of(losses: Tensor, num_counted: float) -> Tensor:
    """sum(losses [N]) / num_counted; nan for none, whose gradient is 0 as torch's."""
    mean = losses.sum() / (num_counted or 1)
    return mean if num_counted else torch.where(torch.ones_like(mean, dtype=torch.bool), float("nan"), mean)


class SoftmaxHead(Head):
    """The exact softmax over all classes: torch.nn.functional.cross_entropy(hidden @ W.T + b, labels)."""

    def __init__(
        self,
        table: Table,
        loss: types.FullSoftmax,
        *,
        reduction: str,
        ignore_index: int | None,
        learning_rate: float | None,
    ) -> None:
        super().__init__(table, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)
        given = loss.class_weights
        self.class_weights = None if given is None else class_weights_of(given, table.spec.num_classes)
        sent = self.class_weights if loss.label_smoothing else None  # else they are weights of labels
        self.loss = replace(loss, class_weights=None if sent is None else to_numpy(sent))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """loss = head(hidden [..., D], labels [...] or [..., T], label_weights [..., T] or None for 1/T).

        Labels of a float dtype [..., V] are a distribution over all classes, as torch's cross_entropy takes it: they
        stream to the server, with the loss and again with the step, which holds this one loss alone.
        scale, a tensor of one element, multiplies the logits and gets its gradient; labels and weights get none.
        """
        check_tensor(labels, "labels")
        if labels.is_floating_point():
            check_tensor(hidden, "hidden")
            if label_weights is not None or self.loss.label_smoothing or self.class_weights is not None:
                raise InvalidArgument("smooth and weight the label distribution itself", field="labels")
            return self.apply_distribution(hidden, labels, self.loss, scale)
        if self.class_weights is not None and not self.loss.label_smoothing:
            label_weights = self._weighted(labels, num_true_of(hidden, labels), label_weights)
        return self.apply_loss(hidden, labels, self.loss, label_weights, scale)

    def num_counted(self, labels: Tensor, label_weights: Tensor | None) -> float:
        """As torch: the class weights of all labels together, or the number of rows."""
        if self.class_weights is None:
            return super().num_counted(labels, label_weights)
        if self.loss.label_smoothing:
            label_weights = self._weighted(labels, labels.shape[1], None)
        return float(0.0 if label_weights is None else label_weights.double().sum())

    def _weighted(self, labels: Tensor, num_true: int, label_weights: Tensor | None) -> Tensor:
        """Weights of labels times the weights of their classes."""
        assert self.class_weights is not None
        ids = labels.detach().cpu()
        counted = torch.ones_like(ids, dtype=torch.bool) if self.ignore_index is None else ids != self.ignore_index
        places = ids.long().clamp(0, len(self.class_weights) - 1)  # what is no class is refused by the server
        of_class = self.class_weights[places] * counted
        if label_weights is not None:
            return label_weights.detach().cpu() * of_class
        if num_true == 1:
            return of_class
        return of_class / counted.sum(-1, keepdim=True).clamp(min=1)


def class_weights_of(given: wire.Array | Tensor, num_classes: int) -> Tensor:
    """class_weights [V] on the CPU, without a graph.

    Raises:
        InvalidArgument: they are no floats [V], or one is negative or not finite.
    """
    weights = torch.as_tensor(given).detach().cpu()
    if weights.shape != (num_classes,) or not weights.is_floating_point():
        raise InvalidArgument(
            f"class_weights is {weights.dtype} {list(weights.shape)}; floats [{num_classes}] are needed",
            field="class_weights",
        )
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise InvalidArgument(
            f"class_weights[{place}] = {float(weights[place])} must be finite and >= 0",
            field="class_weights",
            index=place,
        )
    return weights


L = TypeVar("L", bound=types.Loss)


class LossHead(Head, Generic[L]):
    """A head of one loss, as it was given."""

    def __init__(
        self,
        table: Table,
        loss: L,
        *,
        reduction: str,
        ignore_index: int | None,
        learning_rate: float | None,
    ) -> None:
        super().__init__(table, reduction=reduction, ignore_index=ignore_index, learning_rate=learning_rate)
        self.loss = loss


VALUES = ("sampled", "true_expected_count", "sampled_expected_count")


def check_values(sampled_values: Sequence[Tensor]) -> None:
    """Refuse what is not three tensors, as a sampler gives them.

    Raises:
        InvalidArgument: naming the member.
    """
    if len(sampled_values) != len(VALUES):
        raise InvalidArgument(
            f"sampled_values has {len(sampled_values)} members; ({', '.join(VALUES)}) is needed", field="sampled_values"
        )
    for tensor, name in zip(sampled_values, VALUES, strict=True):
        check_tensor(tensor, f"sampled_values.{name}")


class SampledHead(LossHead[types.SampledSoftmax | types.SampledLogistic]):
    """What the sampled losses share. All parts of a step share their candidates, so micro-batches equal one batch."""

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        sampled_values: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        hit_ids: tuple[Tensor, Tensor | None] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """loss = head(hidden [..., D], labels [...] or [..., T]).

        sampled_values = (sampled [S] or [N, S], true_expected_count of the labels' shape, sampled_expected_count of
        sampled's) replaces the draw; hit_ids = (of the labels, of sampled) replace class ids where accidental hits are
        looked for; scale, a tensor of one element, multiplies the logits and gets its gradient.
        """
        loss, num_true = self.loss, num_true_of(hidden, labels)
        if sampled_values is not None:
            check_values(sampled_values)
            sampled, true_expected_count, sampled_expected_count = map(to_numpy, sampled_values)
            if true_expected_count.shape == tuple(labels.shape):
                true_expected_count = true_expected_count.reshape(-1, num_true)
            values = types.SampledValues(sampled, true_expected_count, sampled_expected_count)
            loss = replace(loss, sampled_values=values)
        if hit_ids is not None:
            of_labels, of_sampled = hit_ids
            check_tensor(of_labels, "hit_ids.labels")
            if of_sampled is not None:
                check_tensor(of_sampled, "hit_ids.sampled")
            if of_labels.shape != labels.shape:
                raise InvalidArgument(
                    f"hit_ids.labels {list(of_labels.shape)} do not fit labels {list(labels.shape)}",
                    field="hit_ids.labels",
                )
            ids = to_numpy(of_labels).reshape(-1, num_true)
            loss = replace(loss, hit_ids=types.HitIds(ids, None if of_sampled is None else to_numpy(of_sampled)))
        return self.apply_loss(hidden, labels, loss, None, scale)


class SampledSoftmaxHead(SampledHead):
    """The sampled softmax: as tf.nn.sampled_softmax_loss, with candidates drawn by the server for each step."""


class SampledLogisticHead(SampledHead):
    """Noise-contrastive estimation and its relatives: as tf.nn.nce_loss, with candidates drawn for each step."""


class SigmoidHead(LossHead[types.FullSigmoid]):
    """The logistic loss over all classes, summed a row."""

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """loss = head(hidden [..., D], labels [...] or [..., T], label_weights [..., T] or None for 1)."""
        return self.apply_loss(hidden, labels, self.loss, label_weights, scale)


class MarginSoftmaxHead(LossHead[types.FullSoftmax | types.SampledSoftmax]):
    """The combined margin softmax: paddle.nn.functional.margin_cross_entropy over cosines of hidden and rows."""

    def forward(self, hidden: Tensor, labels: Tensor, *, scale: Tensor | None = None) -> Tensor:
        """loss = head(hidden [..., D], labels [...])."""
        return self.apply_loss(hidden, labels, self.loss, None, scale)
