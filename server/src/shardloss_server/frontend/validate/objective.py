"""Checks of the options of a loss, and of which options combine."""

from __future__ import annotations

import math

import torch
from shardloss.errors import InvalidArgument
from torch import Tensor

from shardloss_server.frontend.request import LossRequest
from shardloss_server.frontend.validate.tensors import finite, finite_number, in_range, refuse_if, refuse_where, vector
from shardloss_server.numerics.transform import Transform
from shardloss_server.shard.record import TableSpec


def objective(request: LossRequest, spec: TableSpec) -> None:
    """Check the options of a loss and their combination, as docs/losses.md lists them."""
    one = request.objective
    transform(one.transform, spec)
    in_range(one.label_smoothing, "full_softmax.label_smoothing", 0.0, 1.0)
    in_range(one.z_loss, "z_loss", 0.0, math.inf)
    finite_number(one.z_loss, "z_loss")
    if one.family == "logistic":
        refuse_if(one.z_loss != 0, "only softmax losses support z_loss", "z_loss")
        refuse_if(one.margin is not None, "only softmax losses support a margin", "margin")
        refuse_if(request.want.lse, "a logistic loss has no log-sum-exp", "want_lse")
    if one.label_smoothing:
        refuse_if(
            one.transform.soft_cap is not None, "label smoothing and a soft cap do not combine", "logits.soft_cap"
        )
    if request.class_weights is not None:
        class_weights(request.class_weights, spec)
    if one.margin is not None:
        margin(request, spec)


def margin(request: LossRequest, spec: TableSpec) -> None:
    """Check the numbers of a margin, and refuse the options that it does not combine with."""
    one = request.objective.margin
    assert one is not None
    in_range(one.m1, "margin.m1", 0.0, math.inf)
    for name, value in (("m1", one.m1), ("m2", one.m2), ("m3", one.m3)):
        finite_number(value, f"margin.{name}")
    refuse_if(request.labels.shape[1] != 1, "a margin needs one label per row", "labels")
    refuse_if(spec.bias, "a margin needs a table without biases: a biased logit is not a cosine", "margin")
    refuse_if(request.label_weights is not None, "a margin does not combine with label_weights", "label_weights")
    refuse_if(
        request.class_weights is not None, "a margin does not combine with class_weights", "full_softmax.class_weights"
    )
    smoothing, cap = request.objective.label_smoothing, request.objective.transform.soft_cap
    refuse_if(smoothing != 0, "a margin does not combine with label smoothing", "full_softmax.label_smoothing")
    refuse_if(cap is not None, "a margin does not combine with a soft cap", "logits.soft_cap")


def transform(one: Transform, spec: TableSpec) -> None:
    """Check that scale and soft cap are positive and finite in the table's compute dtype."""
    limits = torch.finfo(getattr(torch, spec.compute_dtype))
    for name, value in (("scale", one.scale), ("soft_cap", one.soft_cap)):
        if value is not None and not limits.tiny <= value <= limits.max:
            raise InvalidArgument(
                f"logits.{name} = {value} must be finite and above 0 in {spec.compute_dtype}", field=f"logits.{name}"
            )


def class_weights(weights: Tensor, spec: TableSpec) -> None:
    """Check class weights: [V], finite and not negative, with a finite sum."""
    field = "full_softmax.class_weights"
    vector(field, weights, None, spec)
    refuse_if(
        len(weights) != spec.num_classes, f"{field} has {len(weights)} entries for {spec.num_classes} classes", field
    )
    refuse_where(weights < 0, weights, field, "is negative")
    finite(weights.double().sum()[None], field, spec)
