"""The Triton kernels as the engine's operations. Importing it imports triton: only backend `triton` does."""

from __future__ import annotations

import torch

from engine.ops import Ops
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.silu_mul import silu_mul


def triton_ops() -> Ops:
    return Ops(rms_norm, add_rms_norm, _silu_mul, packed=True)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Dense: the product that follows reads it whole."""
    return silu_mul(gate, up, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device))
