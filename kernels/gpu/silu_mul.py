"""The gate of a SwiGLU feed-forward layer: silu(gate) * up, in float32, rounded once.

    gate [T, F], up [T, F]   →  [T, F], in place of gate unless `out` is given
    gate_up [T, 2 F]         →  [T, F]: what one fused projection wrote, the gate first

F must be dense; the rows may be strided.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.chip import multiprocessors
from kernels.silu_mul import silu_mul_reference

WIDE, NARROW = 2048, 512  # columns per program: 16 bytes of bfloat16 for each thread at the least


def silu_mul_wide_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu_mul_reference(gate.float(), up.float()).to(gate.dtype)


@triton.jit
def _gate(gate, up, out, width, gate_token, up_token, out_token, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    opening = tl.load(gate + token * gate_token + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + token * up_token + column, mask=inside, other=0.0).to(tl.float32)
    passed = opening * tl.sigmoid(opening) * value
    tl.store(out + token * out_token + column, passed.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`gate` is overwritten unless `out` is given: it is the largest activation of a layer, and nobody needs it."""
    out = gate if out is None else out
    assert gate.dim() == 2 and gate.shape == up.shape == out.shape, (gate.shape, up.shape, out.shape)
    assert gate.dtype == up.dtype == out.dtype and gate.is_floating_point(), (gate.dtype, up.dtype, out.dtype)
    assert gate.device == up.device == out.device, (gate.device, up.device, out.device)
    tokens, width = gate.shape
    if tokens == 0 or width == 0:
        return out
    assert gate.stride(1) == up.stride(1) == out.stride(1) == 1, (gate.stride(), up.stride(), out.stride())
    fills = tokens * triton.cdiv(width, WIDE) >= 2 * multiprocessors(gate.device)
    block = min(WIDE if fills else NARROW, triton.next_power_of_2(width))
    _gate[(tokens, triton.cdiv(width, block))](
        gate, up, out, width, gate.stride(0), up.stride(0), out.stride(0), BLOCK=block,
        num_warps=min(max(block // 256, 1), 8), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def silu_mul_packed(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[T, 2 F] → [T, F], dense unless `out` says otherwise."""
    assert gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, gate_up.shape
    gate, up = gate_up.chunk(2, dim=1)
    return silu_mul(gate, up, gate_up.new_empty(gate.shape) if out is None else out)
