"""Root-mean-square norm over the last dimension, with the residual addition that precedes it in a decoder.

    x [T, E] or [T, H, E], weight [E]                →  out, shaped like x      x / rms(x) * weight
    x [T, E], residual [T, E], weight [E]            →  out [T, E], and x + residual in `residual`

float32 inside, rounded once; the sum is rounded before it is normed, because it is the rounded one that the next layer
adds to. E must be dense, everything else may be strided: the heads of one fused projection are normed where they lie.
E at most 16384: a row stays in the registers of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.chip import multiprocessors
from kernels.rms_norm import rms_norm_reference

MAX_WIDTH = 16384
PROGRAM_ITEMS = 2048  # of short rows, so many elements share a program: 16 for each thread of four warps


@triton.jit
def _norm(
    x, residual, weight, out, rows, heads, eps,
    x_token, x_head, residual_token, out_token, out_head,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads).to(tl.int64)[:, None]
    wide = tl.load(x + token * x_token + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual + token * residual_token + column
        total = (wide + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(at, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = wide * scale[:, None] * factor
    tl.store(out + token * out_token + head * out_head + column, normed.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor:
    width = x.shape[-1]
    assert x.dim() in (2, 3) and 0 < width <= MAX_WIDTH, x.shape
    assert weight.shape == (width,) and weight.is_contiguous(), (weight.shape, x.shape)
    assert weight.dtype == x.dtype and x.is_floating_point(), (weight.dtype, x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert out.shape == x.shape and out.dtype == x.dtype, (out.shape, x.shape)
    assert x.device == weight.device == out.device, (x.device, weight.device, out.device)
    assert x.stride(-1) == out.stride(-1) == 1 or width == 1, (x.stride(), out.stride())
    heads = x.shape[1] if x.dim() == 3 else 1
    rows = x.shape[0] * heads
    if rows == 0:
        return out
    block = triton.next_power_of_2(width)
    spread = triton.next_power_of_2(triton.cdiv(rows, 2 * multiprocessors(x.device)))  # few rows: one each
    rows_each = min(max(1, PROGRAM_ITEMS // block), spread)
    _norm[(triton.cdiv(rows, rows_each),)](
        x, x if residual is None else residual, weight, out, rows, heads, eps,
        x.stride(0), x.stride(1) if heads > 1 else 0, 0 if residual is None else residual.stride(0),
        out.stride(0), out.stride(1) if heads > 1 else 0,
        WIDTH=width, ROWS=rows_each, BLOCK=block, ADD=residual is not None,
        num_warps=min(max(rows_each * block // 512, 1), 16), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """[T, E] or [T, H, E] normed over E. `out` may be `x` itself."""
    return _launch(x, None, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual [T, E], and the sum itself, which overwrites `residual`. `out` may be `x`."""
    assert x.dim() == 2 and x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape)
    assert x.device == residual.device and residual.stride(-1) == 1, (x.device, residual.device, residual.stride())
    return _launch(x, residual, weight, eps, out), residual


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps), total
