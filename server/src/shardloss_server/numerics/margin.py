"""The combined margin of a true class: ArcFace, CosFace and SphereFace in one formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SINE = 1e-6  # the slope stays finite where |cos| = 1; above it the derivative is exact


@dataclass(frozen=True, slots=True)
class Margin:
    """The margin of a true class: cos(theta) becomes cos(m1 theta + m2) - m3."""

    m1: float
    m2: float
    m3: float


def with_margin(logits: Tensor, margin: Margin, scale: float) -> tuple[Tensor, Tensor]:
    """Return scale * (cos(m1 theta + m2) - m3) and its derivative with respect to true logits scale * cos(theta) [L].

    cos is clamped to [-1, 1], with slope 0 outside, except for m1 = 1, m2 = 0, which needs no angle.
    Source: ArcFace (Deng et al. 2019, section 2.3), paddle.nn.functional.margin_cross_entropy.
    """
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return logits - scale * margin.m3, torch.ones_like(logits)
    cosine = logits.double() / scale
    theta = torch.acos(cosine.clamp(-1.0, 1.0))
    moved = margin.m1 * theta + margin.m2
    slope = margin.m1 * torch.sin(moved) / torch.sin(theta).clamp(min=LEAST_SINE)
    slope = torch.where(cosine.abs() > 1.0, 0.0, slope)
    return (scale * (torch.cos(moved) - margin.m3)).to(logits.dtype), slope.to(logits.dtype)
