"""The logit transform: scale, soft cap, and normalised hidden and rows, with their derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize: a row of zeros has cosine 0 with everything


@dataclass(frozen=True, slots=True)
class Transform:
    """The logit transform z = cap(scale * (hidden . row + bias)).

    normalize makes hidden and rows unit vectors first; with soft_cap None there is no cap.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    normalize: bool = False


PLAIN = Transform()


def normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return v / |v| [M, D] and |v| [M] of vectors [M, D], with |v| at least LEAST_NORM.

    Vectors are first divided by their largest entry, so that squares neither overflow nor underflow; a |v| that
    overflows is inf, and v / |v| is still correct.
    """
    if vectors.numel() == 0:
        return vectors, torch.full((len(vectors),), LEAST_NORM, dtype=vectors.dtype)
    largest = vectors.abs().amax(1)
    scaled = vectors / torch.where(largest == 0, 1.0, largest)[:, None]
    inner: Tensor = torch.linalg.vector_norm(scaled, dim=1)
    norms = inner * largest
    is_short = norms <= LEAST_NORM
    units = torch.where(is_short[:, None], vectors / LEAST_NORM, scaled / inner.clamp(min=1.0)[:, None])
    return units, norms.clamp_(min=LEAST_NORM)


def norms_of(vectors: Tensor) -> Tensor:
    """Return |v| [M] of vectors [M, D], at least LEAST_NORM."""
    return normalized(vectors)[1]


def project(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """Return the gradient (G - (G . u) u) / |v| with respect to v [M, D], for the gradient G with respect to v / |v|.

    u [M, D] are the unit vectors. Where |v| was raised to LEAST_NORM, it is a constant, and the gradient is G / |v|.
    """
    along = torch.where(norms > LEAST_NORM, (gradient * unit).sum(1), 0.0)
    return (gradient - along[:, None] * unit) / norms[:, None]


def cap_(logits: Tensor, soft_cap: float) -> Tensor:
    """Compute soft_cap * tanh(z / soft_cap) in place."""
    return logits.div_(soft_cap).tanh_().mul_(soft_cap)


def cap_slope(capped: Tensor, soft_cap: float) -> Tensor:
    """Return the derivative of the cap, from its result `capped`: 1 - tanh(z / soft_cap)^2."""
    ratio = capped / soft_cap
    return 1.0 - ratio * ratio
