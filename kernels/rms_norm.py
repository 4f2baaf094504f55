"""Root-mean-square norm over the last dimension, with the residual addition that precedes it in a decoder.

x [..., E], weight [E]            →  [..., E]            x / rms(x) * weight in float32, rounded once
x [..., E], residual [..., E]     →  normed, x + residual
"""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., E] normed over E."""
    assert weight.shape == x.shape[-1:], (weight.shape, x.shape)
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and the sum itself, which is the next residual. `residual` is overwritten."""
    assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape)
    residual += x
    return rms_norm(residual, weight, eps), residual
