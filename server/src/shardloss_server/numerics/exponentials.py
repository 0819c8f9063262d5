"""Exponentials of logits: what a softmax is made of, and what a step can take from the score before it.

exp(x) is taken as 2^(x log2 e): torch's vectorised exp2 of float32 is 4.5 times as fast as its exp on the CPUs
measured, and x log2 e is off by half a unit of its last place, as x itself is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
MOST_ABOVE = math.exp(8.0)  # a logit 8 above its reference is rounded by up to 0.03


@dataclass(frozen=True, slots=True)
class Exponentials:
    """values [N, C] = exp(z - top) of a block's logits z, with top [N] their maximum (0 for a row of -inf).

    Narrow ones have values in bfloat16, so their products are of bfloat16, and top [N] is near the maximum.
    """

    values: Tensor
    top: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return self.values.nbytes + self.top.nbytes

    def gradient(self, hidden: Tensor, lse: Tensor, scale: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
        """dz^T hidden [C, D] and the sums of dz [C] (zeros without with_bias), where dz = scale exp(z - lse).

        In hidden's dtype; lse [N] float64, scale [N] = g * weight. Only hidden is rescaled, by scale exp(top - lse):
        nothing of the block's size is computed but the product. Source: docs/design.md, "What was measured".
        """
        factor = (scale.double() * torch.exp(self.top.double() - finite_lse(lse))).to(hidden.dtype)
        rows = (self.values.T @ (hidden * factor[:, None]).to(self.values.dtype)).to(hidden.dtype)
        bias = self.values.T.to(hidden.dtype) @ factor if with_bias else torch.zeros(len(rows), dtype=rows.dtype)
        return rows, bias


def exponentials_(logits: Tensor) -> Exponentials:
    """Exponentials in place of logits [N, C], C >= 1. A row may be all -inf."""
    top = logits.amax(1)
    top = torch.where(torch.isneginf(top), 0.0, top)
    return Exponentials(exp_(logits.sub_(top[:, None])), top)


class Narrow:
    """Exponentials in bfloat16 of hidden [N, D] against one block of rows after another, both bfloat16.

    A reference [N] is subtracted inside the product, before a logit is rounded: the largest logit of the blocks before.
    So what counts, logits near the top, keeps its digits; rounded as it is, a loss of 8-sigma logits was off by 0.17
    (docs/design.md, "What was measured"). A block with a logit far above its reference is taken again with its own.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden.to(torch.bfloat16)
        self._reference: Tensor | None = None

    def of(self, rows: Tensor, out: Tensor | None = None) -> tuple[Exponentials, Tensor]:
        """Of the next block of rows [C, D], C >= 1: exponentials (in `out`) and their sums [N] float32."""
        if self._reference is None:
            self._reference = self._largest_logits(rows)
        exponentials, total, largest = self._exponentials(rows, self._reference, out)
        if not bool((largest <= MOST_ABOVE).all()):  # or it overflowed
            exponentials, total, largest = self._exponentials(rows, self._largest_logits(rows), out)
        self._reference = torch.maximum(self._reference, exponentials.top + largest.log())
        return exponentials, total

    def _exponentials(self, rows: Tensor, reference: Tensor, out: Tensor | None) -> tuple[Exponentials, Tensor, Tensor]:
        top = reference.to(torch.bfloat16)
        logits = torch.addmm((-top)[:, None].expand(-1, len(rows)), self._hidden, rows.T, out=out)
        values = exp_(logits.float())
        return Exponentials(logits.copy_(values), top.float()), values.sum(1), values.amax(1)

    def _largest_logits(self, rows: Tensor) -> Tensor:
        return (self._hidden @ rows.T).amax(1).float()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are fast there; elsewhere they are slower than those of float32."""
    if device.type == "cuda":
        return True
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def exp_(values: Tensor) -> Tensor:
    """exp(values), in place."""
    return values.mul_(LOG2_E).exp2_()


def finite_lse(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf: a row without a column has exp(-inf - 0) = 0 everywhere, never nan."""
    return torch.where(torch.isneginf(lse), 0.0, lse)
