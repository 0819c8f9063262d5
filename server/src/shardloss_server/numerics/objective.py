"""The objective: a loss family and its options."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardloss_server.numerics.margin import Margin
from shardloss_server.numerics.transform import Transform


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss without its tensors; docs/losses.md lists which options combine.

    family is "softmax" or "logistic" (NCE, sampled logistic, full sigmoid). label_smoothing and z_loss are the weights
    of these terms; learned_scale requests the derivative of each loss with respect to the transform's scale. With
    unit_mass_gradient, gradients treat a row's weights as a distribution, whatever their sum.
    """

    family: str = "softmax"
    transform: Transform = field(default_factory=Transform)
    margin: Margin | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    learned_scale: bool = False
    unit_mass_gradient: bool = False
