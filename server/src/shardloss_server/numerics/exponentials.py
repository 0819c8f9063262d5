"""Exponentials of logits: the terms of a softmax, which a step can reuse from the score before it.

exp(x) is computed as 2^(x log2 e): torch's vectorised exp2 of float32 is 4.5 times as fast as its exp on the CPUs
measured, and x log2 e is off by half a unit in the last place, as x itself is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
MOST_ABOVE = math.exp(8.0)  # a logit 8 above its reference is rounded by up to 0.03
MOST_TOP = 2.0**15 / LOG2_E  # beyond it a reference is off by up to 2^7, and 2^x leaves the range of float32
ABOVE = math.e  # a reference moves for a logit more than 1 above it; nearer ones lose no precision
CACHED = 1 << 17  # elements of float32 that the second-level cache holds


@dataclass(frozen=True, slots=True)
class Exponentials:
    """Exponentials of a block's logits z: values [N, C] = exp(z - top), top [N] their maximum (0 for a row of -inf).

    Those of `Narrow` have bfloat16 values, hence bfloat16 products, and top [N] is only near the maximum.
    """

    values: Tensor
    top: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of values and top, in bytes."""
        return self.values.nbytes + self.top.nbytes

    def gradient(self, upstream: Rescaled, with_bias: bool) -> tuple[Tensor, Tensor]:
        """Return dz^T hidden [C, D] and the sums of dz [C] (zeros without with_bias), with dz = scale exp(z - lse).

        Both are in hidden's dtype. Only hidden is rescaled, by scale exp(top - lse): apart from the product, nothing of
        the block's size is computed. Source: docs/adr/0008-exponentials-are-kept.md.
        """
        factor, hidden = upstream.by(self.top, self.values.dtype)
        rows = (self.values.T @ hidden).to(factor.dtype)
        bias = self.values.T.to(factor.dtype) @ factor if with_bias else torch.zeros(len(rows), dtype=rows.dtype)
        return rows, bias


class Rescaled:
    """The product of hidden [N, D] and scale exp(top - lse), for the tops [N] of one block after another.

    lse [N] float64, scale [N] = g * weight. Computed again only if top is not the same tensor as before.
    """

    def __init__(self, hidden: Tensor, lse: Tensor, scale: Tensor) -> None:
        self.lse, self.scale = lse, scale
        self._hidden = hidden
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def by(self, top: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factor scale exp(top - lse) [N] and the product [N, D], the latter in `dtype`."""
        if self._last is None or self._last[0] is not top:
            factor = (self.scale.double() * torch.exp(top.double() - finite_lse(self.lse))).to(self._hidden.dtype)
            self._last = top, factor, (self._hidden * factor[:, None]).to(dtype)
        return self._last[1:]


class Narrow:
    """bfloat16 exponentials of the logits of hidden [N, D] and one block of rows after another, both bfloat16.

    A reference [N], the largest logit of the blocks before, is subtracted inside the product, before rounding. So the
    logits that matter, those near the top, keep their digits; without it, a loss over logits with a standard deviation
    of 8 was off by 0.17 (docs/adr/0009-bfloat16-products.md). A block with a logit far above its reference is computed
    again with its own largest logit as the reference.

    Products are scaled by log2 e before rounding, so that a reference is a power of two, stored as its exponent.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden.to(torch.bfloat16)
        self._reference = torch.full((len(hidden),), -torch.inf)
        self._top = self._reference

    def of(self, rows: Tensor, out: Tensor | None = None) -> tuple[Exponentials, Tensor]:
        """Compute the exponentials (in `out`) of the next block of rows [C, D], C >= 1, and their sums [N] float32.

        Their top never falls, and unless it has risen it is the same tensor as for the previous block. Sums are nan for
        rows with |top| >= MOST_TOP, because no bfloat16 reference is close to such logits.
        """
        if bool(torch.isneginf(self._reference).any()):
            self._raise(self._largest_logits(rows))
        values, total, largest = self._exponentials(rows, out)
        if not bool((largest <= MOST_ABOVE).all()):  # also if it overflowed
            self._raise(self._largest_logits(rows))
            values, total, largest = self._exponentials(rows, out)
        exponentials = Exponentials(values, self._top)
        total = total.masked_fill(self._top.abs() >= MOST_TOP, torch.nan)
        if bool((largest > ABOVE).any()):
            self._raise(self._reference + largest.log2())
        return exponentials, total

    def _raise(self, reference: Tensor) -> None:
        self._reference = torch.maximum(self._reference, reference).to(torch.bfloat16).float()
        self._top = self._reference / LOG2_E

    def _exponentials(self, rows: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return 2^(z log2 e - reference) [N, C], its sums [N] in float32 and its maxima [N].

        The values are stored class by class, as the product of a step reads them.
        """
        by_class = torch.empty(len(rows), len(self._hidden), dtype=rows.dtype) if out is None else out.T
        offset = (-self._reference).to(torch.bfloat16)
        torch.addmm(offset, rows, self._hidden.T, out=by_class, alpha=LOG2_E)
        pieces = torch.split(by_class, max(1, CACHED // max(1, len(self._hidden))))
        total = torch.stack([exp2_(piece) for piece in pieces]).sum(0)
        largest = by_class.view(torch.int16).amax(0)  # the order of bfloat16 numbers >= 0 is that of their bits
        return by_class.T, total, largest.view(torch.bfloat16).float()

    def _largest_logits(self, rows: Tensor) -> Tensor:
        return (self._hidden @ rows.T).amax(1).float() * LOG2_E


def exp2_(narrow: Tensor) -> Tensor:
    """Replace x [C, N] of bfloat16 by 2^x, in place; return the sums [N] of 2^x before it is rounded from float32."""
    wide = narrow.float().exp2_()
    narrow.copy_(wide)
    return wide.sum(0)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return True if a device has fast products of bfloat16 matrices; otherwise they are slower than float32 ones."""
    if device.type == "cuda":
        return True
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def exp_(values: Tensor) -> Tensor:
    """Compute exp(values) in place."""
    return values.mul_(LOG2_E).exp2_()


def finite_lse(lse: Tensor) -> Tensor:
    """Return lse with 0 in place of -inf, so that a row without columns has exp(-inf - 0) = 0 everywhere, never nan."""
    return torch.where(torch.isneginf(lse), 0.0, lse)
