"""Initial values of rows: a function of (seed, class id, column) alone, the same for any sharding of the table.

Bits are two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014) over a counter of seed, class id and column
pair. Normals are computed by Box-Muller in float64, so that the last bit of a float32 does not depend on the machine's
float32 math library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # scratch tensors stay inside the second-level cache
GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd increment of SplitMix64
SPLITMIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
SPLITMIX_2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Initializer:
    """The distribution of the initial values of rows, drawn by seed.

    kind is "normal" (scale = standard deviation), "uniform" (on [-scale, scale)) or "zeros".
    """

    kind: str
    scale: float
    seed: int


def shifted_xor_(x: Tensor, bits: int) -> Tensor:
    """Apply x ^= x >> bits with a logical shift, in place, on int64."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def mix_(x: Tensor) -> Tensor:
    """Apply the SplitMix64 finaliser in place, on int64 (wrapping)."""
    shifted_xor_(x, 30).mul_(SPLITMIX_1)
    shifted_xor_(x, 27).mul_(SPLITMIX_2)
    return shifted_xor_(x, 31)


def to_int64(value: int) -> int:
    """Return the signed number with the same low 64 bits as value."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def row_keys(seed: int, stream: int, class_ids: Tensor) -> Tensor:
    """Return 64 random bits for each class id [M] int64, by (seed, stream)."""
    return mix_(class_ids * GOLDEN_GAMMA + to_int64(seed * 0xD1342543DE82EF95 + stream + 1))


def random_bits(seed: int, stream: int, class_ids: Tensor, num_columns: int) -> Tensor:
    """Return 64 random bits for each (class id, column) [M, num_columns] int64, by (seed, stream)."""
    column = torch.arange(1, num_columns + 1) * GOLDEN_GAMMA
    return mix_(row_keys(seed, stream, class_ids)[:, None] + column[None, :])


def noise_bits(seed: int, stream: int, class_ids: Tensor, num_columns: int) -> Tensor:
    """Return 16 random bits for each (class id, column) [M, num_columns] int32, five times as fast as `random_bits`.

    By (seed, stream): the upper half of the product of two odd keys, one of the class and one of the column, modulo
    2^32. It is uniform over the class's keys and nearly independent between two columns (multiply-shift hashing,
    Dietzfelbinger et al. 1997): good enough for rounding, not for drawing.
    """
    row = row_keys(seed, stream, class_ids).to(torch.int32).bitwise_or_(1)
    column = row_keys(seed, stream, torch.arange(-num_columns, 0)).to(torch.int32).bitwise_or_(1)
    return (row[:, None] * column[None, :]).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def high_uniform(bits: Tensor) -> Tensor:
    """Return the upper 32 bits as float64 in (0, 1)."""
    return ((bits >> 32) & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)


def low_uniform(bits: Tensor) -> Tensor:
    """Return the lower 32 bits as float64 in (0, 1)."""
    return (bits & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)


def initial_rows(initializer: Initializer, class_ids: Tensor, dim: int) -> Tensor:
    """Return the initial rows [M, D] of classes [M], in float64.

    One 64-bit draw serves two neighbouring columns: (r cos a, r sin a) for normals, its halves for uniforms.
    """
    if initializer.kind == "zeros":
        return torch.zeros(len(class_ids), dim, dtype=torch.float64)
    bits = random_bits(initializer.seed, 0, class_ids, (dim + 1) // 2)
    first, second = high_uniform(bits), low_uniform(bits)
    if initializer.kind == "normal":
        radius = first.log_().mul_(-2.0).sqrt_().mul_(initializer.scale)
        angle = second.mul_(2.0 * math.pi)
        pair = (torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius))
    else:
        pair = (first.mul_(2.0).sub_(1.0).mul_(initializer.scale), second.mul_(2.0).sub_(1.0).mul_(initializer.scale))
    return torch.stack(pair, dim=2).view(len(class_ids), -1)[:, :dim]


def fill_rows_(initializer: Initializer, class_ids: Tensor, rows: Tensor) -> None:
    """Overwrite rows [M, D] of any float dtype with the initial values of classes [M], chunk by chunk."""
    if initializer.kind == "zeros":
        rows.zero_()
        return
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(class_ids), step):
        chunk = class_ids[start : start + step]
        rows[start : start + step] = initial_rows(initializer, chunk, rows.shape[1])


def round_stochastically(values: Tensor, seed: int, step: int, class_ids: Tensor) -> Tensor:
    """Round float32 [M, D] to bfloat16, up or down at random by distance, so that E[rounded] = value.

    Adds 16 random bits, keyed by (seed, step, class id, column), below the bits that are kept, and truncates. Values
    that are not finite are rounded to nearest. Source: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with
    Limited Numerical Precision", ICML 2015 (arXiv:1502.02551), section 3.
    """
    noise = noise_bits(seed, step, class_ids, values.shape[1])
    kept = noise.add_(values.contiguous().view(torch.int32)).bitwise_right_shift_(16)
    rounded = kept.to(torch.int16).view(torch.bfloat16)
    if bool(torch.isfinite(values.sum())):
        return rounded
    return torch.where(torch.isfinite(values), rounded, values.to(torch.bfloat16))
