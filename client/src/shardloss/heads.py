"""Heads: torch modules that compute losses over a remote table and are called like a local loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, cast

import torch
from torch import Tensor

from shardloss import types, wire
from shardloss.autograd import (
    FLOAT_DTYPES,
    Mark,
    RemoteLoss,
    check_sendable,
    check_tensor,
    num_true_of,
    to_ids,
    to_numpy,
    to_torch,
    to_wire,
)
from shardloss.errors import BadReply, InvalidArgument, NotSupported
from shardloss.optimizer import Part, Pending, RemoteOptimizer, uncompiled
from shardloss.table import Table

REDUCTIONS = ("mean", "sum", "none")
IN_EVAL_MODE = (
    "its losses were computed in eval mode; call head.train() (or model.train()) to train the table, or "
    "head.requires_grad_(False) to freeze it"
)


class Head(torch.nn.Module):
    """A loss over a remote table: head(hidden, labels) -> loss.

    hidden [..., D] is on any device in float32, float64, float16 or bfloat16. labels are int64 or int32: [...] with one
    class per row, or [..., T] with T true classes. The loss is float32 (float64 for a float64 table), [...] with
    reduction "none". "mean" divides as torch does (docs/losses.md): by the number of rows with a label other than
    ignore_index or, with label_weights or class_weights, by the sum of the weights of these labels; it is nan if that
    is 0.

    Each call in training mode with gradients enabled is a part of the current step. `optimizer(lr)` returns the torch
    optimizer whose step() commits the parts whose backward has run and gives up the others; create it before training.
    In eval mode, under no_grad or after `requires_grad_(False)` a call does not change the table, and the server keeps
    nothing of it. Warnings name the likely mistakes once: losses without an optimizer, many losses without a step(),
    and a step() after losses in eval mode. zero_grad() of the optimizer gives up the step unless one of its losses
    still waits for its backward; a second backward of a loss of that step (retain_graph=True) can then no longer be
    committed. With its own learning_rate the head commits in backward, for simple loops with one loss per step.
    copy.deepcopy returns a head of the same table with its own steps. torch.compile runs the head, its backward and its
    optimizer uncompiled, between compiled graphs. A backward frees the gradient of hidden unless retain_graph is set.
    torch.func, forward-mode differentiation, torch.export and torch.jit are not supported.

    One thread at a time may train with a head and its optimizer, as with a `Session`. torch.nn.DataParallel is refused;
    each process of torch.nn.parallel.DistributedDataParallel has its own head.

    wire_dtype, None by default, is the dtype in which hidden and its gradient are sent: torch.bfloat16 or torch.float16
    halve the bytes of float32 hidden, with one rounding in each direction. The gradient of a loss is rounded before it
    is multiplied by the upstream gradient: float16 then rounds values below 6e-8 to 0 and refuses values above 65,504.

    Raises:
        InvalidArgument: a tensor has a wrong type, dtype or shape; hidden that overflowed to inf is refused and does
            not become a nan loss.
        NotSupported: the call is inside a transform of torch.func, or hidden has no values that can be sent.
        ShardlossError: the service returned an error; see docs/errors.md.
    """

    advice = "call head.optimizer(lr) first, or head.eval() if the table is to stay as it is"

    def __init__(self, table: Table, *, reduction: str, ignore_index: int | None, learning_rate: float | None) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InvalidArgument(f"reduction = {reduction!r} must be one of {', '.join(REDUCTIONS)}")
        self.table, self.reduction = table, reduction
        self.ignore_index = None if ignore_index is None else wire.integer(ignore_index, "ignore_index")
        self.pending = Pending(table.session(), learning_rate, self.advice)
        self.wire_dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Head:
        twin: Head = type(self).__new__(type(self))
        twin.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        twin.pending = Pending(self.table.session(), self.pending.learning_rate, self.advice)
        return twin.requires_grad_(self.pending.probe.requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the table if requires_grad is False: losses of this head open no ticket and do not train it.

        Call it on the head itself: a head has no parameters, so requires_grad_ of the model around it has no effect.
        """
        self.pending.probe.requires_grad_(requires_grad)
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotSupported("torch.jit.script cannot compile a remote loss; script the other modules")

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise NotSupported(
            "torch.nn.DataParallel would call one head from several threads: use DistributedDataParallel, whose "
            "processes each connect and create their own head"
        )

    def optimizer(self, lr: float, *, overlap: bool = False) -> RemoteOptimizer:
        """Return the optimizer of the remote table: step() commits, zero_grad() drops uncommitted gradients.

        With overlap, step() does not wait: the table applies the step while the trainer continues.
        """
        return RemoteOptimizer(self.pending, lr, overlap)

    def extra_repr(self) -> str:
        """Return the description of the table in repr(head)."""
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
        """Compute the losses of a batch and reduce them.

        scale, a one-element tensor, multiplies the loss's own scale and gets a gradient.
        """
        check_tensor(hidden, "hidden")
        check_sendable(hidden, "hidden")
        if hidden.dim() == 0:
            raise InvalidArgument("hidden is a scalar; [..., D] is needed", field="hidden")
        batch_shape, num_true = hidden.shape[:-1], num_true_of(hidden, labels)
        num_rows = batch_shape.numel()
        if label_weights is not None:
            check_tensor(label_weights, "label_weights")
            if label_weights.shape != labels.shape:
                raise InvalidArgument(
                    f"label_weights {list(label_weights.shape)} must have the shape of labels {list(labels.shape)}",
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
        training = self._opens_part(hidden)
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

    def _opens_part(self, hidden: Tensor) -> bool:
        """Return True if the loss of hidden is a part of the current step."""
        if not torch.is_grad_enabled():
            return False
        if not self.training and self.pending.probe.requires_grad and hidden.requires_grad:
            self.pending.untrained = IN_EVAL_MODE
        return self.training and self.pending.opens_part()

    @uncompiled
    def apply_distribution(
        self, hidden: Tensor, labels: Tensor, loss: types.FullSoftmax, scale: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of labels [..., V] with a weight for every class, as `apply_loss`.

        It must be the only loss of its step.
        """
        check_sendable(hidden, "hidden")
        num_classes = self.table.spec.num_classes
        if hidden.dim() == 0 or labels.shape != (*hidden.shape[:-1], num_classes):
            raise InvalidArgument(
                f"labels {list(labels.shape)} are floats: a distribution [..., {num_classes}] is needed for hidden "
                f"{list(hidden.shape)}",
                field="labels",
            )
        batch_shape = hidden.shape[:-1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        losses = self._distribution_losses(rows, labels.detach().reshape(-1, num_classes), loss, scale)
        if self.reduction == "none":
            return losses.view(batch_shape)
        return losses.sum() if self.reduction == "sum" else mean_of(losses, len(rows))

    def _distribution_losses(
        self, hidden: Tensor, distribution: Tensor, loss: types.FullSoftmax, scale: Tensor | None
    ) -> Tensor:
        differentiable = torch.is_grad_enabled()
        self.pending.join()
        training, sent = self._opens_part(hidden), self._sent(hidden).detach()
        if training:  # the step sends both again: the caller's batch may have changed by then
            distribution, sent = distribution.clone(), sent.clone()
        kind = loss if scale is None else scaled(loss, scale)
        result = self.table.compute_loss(
            to_wire(sent, "hidden"),
            None,
            kind,
            label_distribution=to_numpy(distribution),
            want_hidden_grad=differentiable and hidden.requires_grad,
            want_scale_grad=differentiable and scale is not None and scale.requires_grad,
            grad_dtype=self._grad_dtype,
        )

        def step(g: wire.Array, learning_rate: float, grad_scale: float, sent: Tensor, distribution: Tensor) -> None:
            self.pending.session.train_step(
                to_wire(sent, "hidden"),
                None,
                kind,
                learning_rate=learning_rate,
                grad_scale=grad_scale,
                upstream=g,
                label_distribution=to_numpy(distribution),
                want_hidden_grad=False,
            )

        part = self.pending.part("", step) if training else None
        return self._attached(hidden, scale, result, loss, part, sent, distribution)

    def _sent(self, hidden: Tensor) -> Tensor:
        """Return hidden in the dtype in which it is sent.

        Raises:
            InvalidArgument: the dtype of hidden, or wire_dtype, is not a float dtype of the contract.
        """
        if self.wire_dtype is None:
            return hidden
        for dtype, field in ((hidden.dtype, "hidden"), (self.wire_dtype, "wire_dtype")):
            if dtype not in FLOAT_DTYPES:
                raise InvalidArgument(f"{field} is {dtype!r}; one of {FLOAT_DTYPES} is needed", field=field)
        return hidden.to(self.wire_dtype)

    @property
    def _grad_dtype(self) -> str | None:
        """The name of wire_dtype, such as "bfloat16", or None."""
        return None if self.wire_dtype is None else str(self.wire_dtype).removeprefix("torch.")

    def _attached(
        self,
        hidden: Tensor,
        scale: Tensor | None,
        result: types.LossResult,
        kind: types.Loss,
        part: Part | None,
        *sent: Tensor,
    ) -> Tensor:
        """Return a reply's losses [N] in the graph of hidden [N, D] and scale; part None does not train the table.

        sent are as in `Pending.record`.
        """
        differentiable = torch.is_grad_enabled()
        lacks_grad = differentiable and hidden.requires_grad and result.hidden_grad is None
        lacks_scale = differentiable and scale is not None and scale.requires_grad and result.scale_grad is None
        if result.loss is None or lacks_grad or lacks_scale:
            raise BadReply("the reply lacks the loss or a requested gradient")
        loss, mark = to_torch(result.loss), None
        if part is not None:
            mark = Mark.apply(self.pending.probe, self.pending, part, loss, *sent)  # type: ignore[no-untyped-call]
        scale_grad = None if result.scale_grad is None else result.scale_grad * kind.logits.scale
        inputs = (hidden, mark, scale, loss, result.hidden_grad, scale_grad)
        return cast(Tensor, RemoteLoss.apply(*inputs))  # type: ignore[no-untyped-call]

    def num_counted(self, labels: Tensor, label_weights: Tensor | None) -> float:
        """Return the divisor of "mean" for labels [N, T]: the number of rows with a label that counts."""
        counted = self._counted(labels)
        if label_weights is not None:
            counted = counted & (label_weights != 0).to(counted.device)
        return int(counted.any(1).sum())

    def _counted(self, labels: Tensor) -> Tensor:
        """Return a mask of the labels that are not ignore_index."""
        return torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index


def scaled(loss: types.Loss, scale: Tensor) -> types.Loss:
    """Return a loss with its scale multiplied by a one-element tensor.

    Raises:
        InvalidArgument: scale is not a tensor of one element.
    """
    check_tensor(scale, "scale")
    if scale.numel() != 1:
        raise InvalidArgument(f"scale has shape {list(scale.shape)}; one element is needed", field="scale")
    logits = replace(loss.logits, scale=loss.logits.scale * float(scale.detach()))
    return replace(loss, logits=logits)


def mean_of(losses: Tensor, num_counted: float) -> Tensor:
    """Return sum(losses [N]) / num_counted, or nan with gradient 0, as torch does, if num_counted is 0."""
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
        sent = self.class_weights if loss.label_smoothing else None  # without smoothing they weight the labels
        self.loss = replace(loss, class_weights=None if sent is None else to_numpy(sent))

    @uncompiled
    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Compute loss = head(hidden [..., D], labels [...] or [..., T], label_weights [..., T] or None for 1/T).

        As class_weights do, label_weights divide "mean": it is sum(losses) / sum(weights).
        Labels of a float dtype [..., V] are a distribution over all classes, as in torch's cross_entropy. They are
        streamed to the server with the loss and again with the step, which can contain no other loss. scale, a
        one-element tensor, multiplies the logits and gets a gradient; labels and label_weights get none.
        """
        check_tensor(labels, "labels")
        if labels.is_floating_point():
            check_tensor(hidden, "hidden")
            if label_weights is not None or self.loss.label_smoothing or self.class_weights is not None:
                raise InvalidArgument("apply smoothing and weights to the label distribution itself", field="labels")
            return self.apply_distribution(hidden, labels, self.loss, scale)
        if self.class_weights is not None and not self.loss.label_smoothing:
            label_weights = self._weighted(labels, num_true_of(hidden, labels), label_weights)
        return self.apply_loss(hidden, labels, self.loss, label_weights, scale)

    if TYPE_CHECKING:  # torch declares that Module.__call__ returns Any
        __call__ = forward

    def num_counted(self, labels: Tensor, label_weights: Tensor | None) -> float:
        """Return torch's divisor: the sum of the weights of the labels that count, or the number of counted rows."""
        if self.class_weights is not None and self.loss.label_smoothing:
            label_weights = self._weighted(labels, labels.shape[1], label_weights)
        if label_weights is None:
            return super().num_counted(labels, None)
        return float((label_weights.detach().cpu().double() * self._counted(labels.cpu())).sum())

    def _weighted(self, labels: Tensor, num_true: int, label_weights: Tensor | None) -> Tensor:
        """Return the weights of labels multiplied by the weights of their classes."""
        assert self.class_weights is not None
        ids = labels.detach().cpu()
        counted = self._counted(ids)
        places = ids.long().clamp(0, len(self.class_weights) - 1)  # the server refuses ids of no class
        of_class = self.class_weights[places] * counted
        if label_weights is not None:
            return label_weights.detach().cpu() * of_class
        if num_true == 1:
            return of_class
        return of_class / counted.sum(-1, keepdim=True).clamp(min=1)


def class_weights_of(given: wire.Array | Tensor, num_classes: int) -> Tensor:
    """Return class_weights [V] on the CPU, detached from autograd.

    Raises:
        InvalidArgument: the weights are not floats [V], or one is negative or not finite.
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
    """A head that computes the loss it was created with."""

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
    """Raise `InvalidArgument` if sampled_values are not three tensors, as a sampler returns them.

    Raises:
        InvalidArgument: a member is missing or not a tensor; the error names it.
    """
    if len(sampled_values) != len(VALUES):
        raise InvalidArgument(
            f"sampled_values has {len(sampled_values)} members; ({', '.join(VALUES)}) is needed", field="sampled_values"
        )
    for tensor, name in zip(sampled_values, VALUES, strict=True):
        check_tensor(tensor, f"sampled_values.{name}")


class SampledHead(LossHead[types.SampledSoftmax | types.SampledLogistic]):
    """The base of heads of sampled losses.

    All parts of a step share their candidates, so micro-batches are equivalent to one batch.
    """

    @uncompiled
    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        sampled_values: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        hit_ids: tuple[Tensor, Tensor | None] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Compute loss = head(hidden [..., D], labels [...] or [..., T]).

        sampled_values = (sampled [S] or [N, S], true_expected_count with the shape of labels, sampled_expected_count
        with that of sampled) replaces the draw. hit_ids = (ids of the labels, ids of sampled) replaces class ids in the
        search for accidental hits. scale, a one-element tensor, multiplies the logits and gets a gradient.
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
                    f"hit_ids.labels {list(of_labels.shape)} must have the shape of labels {list(labels.shape)}",
                    field="hit_ids.labels",
                )
            ids = to_numpy(of_labels).reshape(-1, num_true)
            loss = replace(loss, hit_ids=types.HitIds(ids, None if of_sampled is None else to_numpy(of_sampled)))
        return self.apply_loss(hidden, labels, loss, None, scale)

    if TYPE_CHECKING:  # torch declares that Module.__call__ returns Any
        __call__ = forward


class SampledSoftmaxHead(SampledHead):
    """The sampled softmax of tf.nn.sampled_softmax_loss; the server draws the candidates for each step."""


class SampledLogisticHead(SampledHead):
    """Noise-contrastive estimation, as tf.nn.nce_loss, and related losses; candidates are drawn for each step."""


class SigmoidHead(LossHead[types.FullSigmoid]):
    """The logistic loss over all classes, summed per row."""

    @uncompiled
    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Compute loss = head(hidden [..., D], labels [...] or [..., T], label_weights [..., T] or None for 1).

        A class counts once, however often a row lists it. label_weights are targets, not weights of rows: those of one
        class in a row add up, to at most 1, and "mean" divides by the number of rows that count.
        """
        return self.apply_loss(hidden, labels, self.loss, label_weights, scale)

    if TYPE_CHECKING:  # torch declares that Module.__call__ returns Any
        __call__ = forward


class MarginSoftmaxHead(LossHead[types.FullSoftmax | types.SampledSoftmax]):
    """The combined margin softmax: paddle.nn.functional.margin_cross_entropy over the cosines of hidden and rows."""

    @uncompiled
    def forward(self, hidden: Tensor, labels: Tensor, *, scale: Tensor | None = None) -> Tensor:
        """Compute loss = head(hidden [..., D], labels [...])."""
        return self.apply_loss(hidden, labels, self.loss, None, scale)

    if TYPE_CHECKING:  # torch declares that Module.__call__ returns Any
        __call__ = forward
