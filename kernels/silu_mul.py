"""The gate of a SwiGLU feed-forward layer: silu(gate) * up.

gate [T, F], up [T, F]  →  [T, F]
"""

from __future__ import annotations

import torch


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(gate) * up


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gate` is overwritten: it is the largest activation of a layer, and nobody needs it again."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, up.shape)
    return torch.nn.functional.silu(gate, inplace=True).mul_(up)
