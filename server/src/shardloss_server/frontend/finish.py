"""The path from all shards' answers to a reply: merge, join, finish. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from shardloss_server.frontend import validate
from shardloss_server.frontend.request import Cost, LossReply, LossRequest
from shardloss_server.numerics.loss import (
    Merged,
    hidden_gradient,
    mass_of_gradient,
    per_example_loss,
    scale_gradient,
)
from shardloss_server.numerics.partial import add_all
from shardloss_server.numerics.transform import normalized, project
from shardloss_server.shard.record import LabelTarget, Part, RowGradient, Score, TableSpec
from shardloss_server.shard.runs import merge_runs


def upstream_of(request: LossRequest, like: Tensor) -> Tensor:
    """Return g [N] in compute dtype: the request's, or ones."""
    if request.upstream is None:
        return torch.ones_like(like)
    return request.upstream.to(like.dtype)


def join(gradients: list[RowGradient]) -> RowGradient:
    """Join the gradients of all shards into one, class ids ascending."""
    class_ids = torch.cat([gradient.class_ids for gradient in gradients])
    order = torch.argsort(class_ids)
    rows = torch.cat([gradient.rows for gradient in gradients])
    biases = torch.cat([gradient.biases for gradient in gradients])
    return RowGradient(class_ids[order], rows[order], biases[order])


def merge(scores: list[Score]) -> Merged:
    """Merge the scores of all shards at one version; the bits do not depend on what was merged before."""
    (whole,) = merge_runs(scores, max(score.shards.stop for score in scores))
    return Merged(whole.statistics, whole.target, whole.spread)


def added(targets: list[LabelTarget]) -> LabelTarget:
    """Return the sum of one or more targets of a label distribution."""
    mass = torch.stack([target.mass for target in targets]).sum(0)
    return LabelTarget(add_all([target.target for target in targets]), mass, targets[0].version)


def num_candidates(part: Part, spec: TableSpec) -> int:
    """Return the number of candidates that are scored over all shards, without the labels."""
    return spec.num_classes if part.candidates is None else part.candidates.class_ids.numel()


def finish(
    request: LossRequest,
    part: Part,
    merged: Merged,
    table_grad: RowGradient | None,
    ticket: str,
    version: int,
    cost: Cost,
    has_bias: bool,
) -> LossReply:
    """Compute the requested results from merged statistics; ticket is the name of the open ticket, or "".

    Raises:
        InvalidArgument: a counted row has a loss or a gradient that is not finite, or is too large for grad_dtype.
    """
    want, batch, objective = request.want, part.batch, part.objective
    mass = batch.mass
    loss = per_example_loss(merged, mass, objective.z_loss, batch.spread, batch.hidden).to(mass.dtype)
    gradient = gradient_of_hidden(request, part, merged) if want.hidden_grad else None
    is_finite = torch.isfinite(loss)
    if gradient is not None and not validate.all_finite(gradient):
        is_finite &= torch.isfinite(gradient).all(1)
    scale_grad = None
    if objective.learned_scale:
        scale, slope_mass = objective.transform.scale, mass_of_gradient(mass, objective.unit_mass_gradient)
        scale_grad = scale_gradient(merged, slope_mass, objective.z_loss, scale, batch.spread, batch.hidden)
        scale_grad = scale_grad.to(mass.dtype)
        is_finite &= torch.isfinite(scale_grad)
    validate.finite_logits((mass == 0) | is_finite, "hidden")
    if gradient is not None and want.grad_dtype is not None:
        gradient = in_dtype(gradient, want.grad_dtype)
    return LossReply(
        loss=loss if want.loss else None,
        lse=torch.where(mass == 0, -torch.inf, merged.statistics.lse).to(mass.dtype) if want.lse else None,
        hidden_grad=gradient,
        table_grad=table_grad,
        ticket=ticket,
        version=version,
        replayed=False,
        cost=cost,
        scale_grad=scale_grad,
        has_bias=has_bias,
    )


def in_dtype(gradient: Tensor, name: str) -> Tensor:
    """Return the gradient of hidden in the requested dtype.

    Raises:
        InvalidArgument: an entry is too large for that dtype.
    """
    narrow = gradient.to(getattr(torch, name))
    if not validate.all_finite(narrow):
        validate.refuse_where(~torch.isfinite(narrow), gradient, "hidden_grad", f"is too large for grad_dtype = {name}")
    return narrow


def gradient_of_hidden(request: LossRequest, part: Part, merged: Merged) -> Tensor:
    """Return d loss / d hidden [N, D] for the request's hidden, that is, before scale and normalization."""
    transform, batch = part.objective.transform, part.batch
    mass = mass_of_gradient(batch.mass, part.objective.unit_mass_gradient)
    gradient = hidden_gradient(merged, mass, part.objective.z_loss, batch.spread)
    if transform.scale != 1.0:
        gradient = gradient * transform.scale
    if not transform.normalize:
        return gradient
    return project(gradient, *normalized(request.hidden.to(batch.hidden.dtype)))
