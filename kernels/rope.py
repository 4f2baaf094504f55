"""Rotary position embedding, half-rotation layout: dimension i turns with dimension i + D/2.

    angles   positions [T] int64, inv_freq [D/2] float32   →  Angles(cos, sin), each [T, 1, D]
    apply    x [T, H, D], Angles                           →  [T, H, D]

The angles are computed once per step and shared by all layers: T x D numbers, where a table over every position of a
long context would cost tens of MB per process and save nothing that can be measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Angles(NamedTuple):
    """cos [T, 1, D], and sin [T, 1, D] with its first half negated, so that one roll and two products rotate."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """[D/2] float32: the turns per position of each pair of dimensions, times 2 pi."""
    assert head_dim % 2 == 0, head_dim
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def scale_linear(inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """Positions squeezed by `factor`."""
    return inv_freq / factor


def scale_llama3(
    inv_freq: torch.Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, trained_positions: int
) -> torch.Tensor:
    """Slow dimensions (fewer than `low` turns in the trained context) squeezed, fast ones kept, a ramp between."""
    turns = trained_positions * inv_freq / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def angles(positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> Angles:
    """Computed in float32, then rounded to `dtype`."""
    assert positions.dim() == 1 and inv_freq.dtype == torch.float32, (positions.shape, inv_freq.dtype)
    turned = positions.float()[:, None] * inv_freq  # [T, D/2]
    cos, sin = turned.cos(), turned.sin()
    return Angles(
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


def rope_reference(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """[T, H, D] turned pair by pair, in float32, as the formula says."""
    angle = positions.float()[:, None, None] * inv_freq  # [T, 1, D/2]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)


def rope(x: torch.Tensor, turned: Angles) -> torch.Tensor:
    """[T, H, D] rotated by each token's angles."""
    tokens, _, head_dim = x.shape
    assert turned.cos.shape == (tokens, 1, head_dim), (turned.cos.shape, x.shape)
    assert turned.cos.dtype == x.dtype, (turned.cos.dtype, x.dtype)
    return torch.addcmul(x * turned.cos, x.roll(head_dim // 2, -1), turned.sin)
