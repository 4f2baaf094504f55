"""Rotates the queries in place, rotates the keys, and writes keys and values into their pages, in one pass.

    q [T, H, D], k [T, K, D], v [T, K, D]; positions [T] int32 or int64; inv_freq [D/2] float32
    frames [N, K, L, 2, P, D], layer; pages [T] int32, slots [T] int32
    →  q rotated; frames[page, :, layer, 0, slot] = rotated k; frames[page, :, layer, 1, slot] = v

The layout is that of kernels/rope.py: dimension i turns with dimension i + D/2. The angles are position x inv_freq in
float32, as there; here cosine, sine and rotation stay in float32 too, rounded once. A page below zero marks padding:
such a token is neither read, nor rotated, nor written. k and v stay as they are. D must be dense in all of them; tokens
and heads may be strided (q, k and v as parts of one fused projection). Offsets into the pool have 64 bits.

`q_norm` and `k_norm` [D], given together with `eps`, norm each head before it turns (kernels/rms_norm.py over D), so
that a model with normed heads needs no pass of its own for it.

Pools of 8 bits (float8_e4m3fn, int8): with kv_scales [N, K, L, 2, P] float32 each vector is stored with a scale of its
own, value = stored x scale, where the largest magnitude of the vector becomes the largest that the type holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.chip import multiprocessors
from kernels.page_address import HEAD, LAYER, PAGE, PART, TOKEN
from kernels.rms_norm import rms_norm_reference
from kernels.rope import rope_reference

LARGEST = {torch.float8_e4m3fn: 448, torch.int8: 127}
LEAST_MAGNITUDE = tl.constexpr(1e-30)  # what a vector of zeros is scaled by: no division by zero, no subnormal scale
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 x 2**23: adding it leaves no bits below one, rounded to nearest even
PLACE = (PAGE, HEAD, PART, TOKEN)  # what tells a vector of a layer from another
WIDE_TO_NEAREST = tl.constexpr(6755399441055744.0)  # 1.5 x 2**52: the same in float64
QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)
RADIANS_PER_QUARTER = tl.constexpr(1.5707963267948966)
HEADS = 16  # per program, where there are tokens enough to fill the chip
FEW_HEADS = 4


@triton.jit
def _cos_sin(angle):
    """Within about one rounding of float32, for angles up to 2**24 and beyond.

    The library's functions carry a table walk for large angles, which costs registers and local memory in every
    program. Here the quarter turns are taken out in float64, and short series do for the eighth of a turn that is left.
    """
    wide = angle.to(tl.float64)
    quarters = (wide * QUARTERS_PER_RADIAN + WIDE_TO_NEAREST) - WIDE_TO_NEAREST
    rest = (wide - quarters * RADIANS_PER_QUARTER).to(tl.float32)
    square = rest * rest
    sin = rest + rest * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    cos = square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square * (1 / 3628800))))
    cos = 1.0 + square * (cos - 0.5)
    quarter = quarters.to(tl.int64)
    swap = (quarter & 1) != 0
    turned_cos, turned_sin = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    below_cos, below_sin = ((quarter + 1) & 2) != 0, (quarter & 2) != 0
    return tl.where(below_cos, -turned_cos, turned_cos), tl.where(below_sin, -turned_sin, turned_sin)


@triton.jit
def _load_halves(at, half, inside, HALF: tl.constexpr):
    """Both halves of some heads' vectors, each [heads, HALF], in float32."""
    low = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(at + HALF + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed(low, high, weight, half, inside, eps, HALF: tl.constexpr):
    mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF)
    scale = tl.math.rsqrt(mean + eps)[:, None]
    low_weight, high_weight = _load_halves(weight, half, inside, HALF)
    return low * scale * low_weight, high * scale * high_weight


@triton.jit
def _write(low, high, at, scale_at, half, inside, live, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """Vectors into their slots; where LARGEST is not 0, each divided by a scale of its own."""
    stored = at.dtype.scalar.element_ty
    if LARGEST > 0:
        magnitude = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        scale = tl.maximum(magnitude, LEAST_MAGNITUDE) / LARGEST
        tl.store(scale_at, scale, mask=live)
        low = tl.minimum(tl.maximum(low / scale[:, None], -LARGEST), LARGEST)
        high = tl.minimum(tl.maximum(high / scale[:, None], -LARGEST), LARGEST)
        if stored == tl.int8:  # a cast to integers would cut off
            low, high = (low + TO_NEAREST) - TO_NEAREST, (high + TO_NEAREST) - TO_NEAREST
    tl.store(at + half, low.to(stored), mask=inside)
    tl.store(at + HALF + half, high.to(stored), mask=inside)


@triton.jit
def _rope_write(
    q, k, v, positions, inv_freq, q_norm, k_norm, eps, keys, scales, pages, slots,
    q_token, q_head, k_token, k_head, v_token, v_head,
    frame_page, frame_head, frame_part, frame_slot, scale_page, scale_head, scale_part, scale_slot,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One token and some of its heads: those of the queries in the first programs, those of keys and values after."""
    token = tl.program_id(0).to(tl.int64)
    page = tl.load(pages + token).to(tl.int64)
    if page < 0:
        return
    half = tl.arange(0, BLOCK)[None, :]
    in_half = half < HALF
    turn = tl.load(inv_freq + half, mask=in_half, other=0.0)
    cos, sin = _cos_sin(tl.load(positions + token).to(tl.float32) * turn)
    group = tl.program_id(1)
    q_groups: tl.constexpr = (Q_HEADS + Q_BLOCK - 1) // Q_BLOCK
    if group < q_groups:  # names of their own: the branches' shapes differ
        q_at = tl.arange(0, Q_BLOCK)[:, None] + group * Q_BLOCK
        in_q = (q_at < Q_HEADS) & in_half
        to_q = q + token * q_token + q_at.to(tl.int64) * q_head
        q_low, q_high = _load_halves(to_q, half, in_q, HALF)
        if NORM:
            q_low, q_high = _normed(q_low, q_high, q_norm, half, in_half, eps, HALF)
        tl.store(to_q + half, (q_low * cos - q_high * sin).to(q.dtype.element_ty), mask=in_q)
        tl.store(to_q + HALF + half, (q_high * cos + q_low * sin).to(q.dtype.element_ty), mask=in_q)
    else:
        kv_at = tl.arange(0, KV_BLOCK) + (group - q_groups) * KV_BLOCK
        live = kv_at < KV_HEADS
        head = kv_at.to(tl.int64)
        inside = live[:, None] & in_half
        k_low, k_high = _load_halves(k + token * k_token + head[:, None] * k_head, half, inside, HALF)
        v_low, v_high = _load_halves(v + token * v_token + head[:, None] * v_head, half, inside, HALF)
        if NORM:
            k_low, k_high = _normed(k_low, k_high, k_norm, half, in_half, eps, HALF)
        slot = tl.load(slots + token).to(tl.int64)
        to = keys + page * frame_page + slot * frame_slot + head[:, None] * frame_head
        scale_to = scales + page * scale_page + slot * scale_slot + head * scale_head
        low, high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
        _write(low, high, to, scale_to, half, inside, live, HALF, LARGEST)
        _write(v_low, v_high, to + frame_part, scale_to + scale_part, half, inside, live, HALF, LARGEST)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    slots: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    _check(q, k, v, positions, inv_freq, frames, layer, pages, slots)
    _check_options(q, frames, kv_scales, q_norm, k_norm)
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if tokens == 0:
        return
    most = HEADS if tokens >= 2 * multiprocessors(q.device) else FEW_HEADS
    q_block, kv_block = (min(most, triton.next_power_of_2(heads)) for heads in (q_heads, kv_heads))
    keys = frames[:, :, layer, 0]
    scales = inv_freq if kv_scales is None else kv_scales[:, :, layer, 0]
    scale_strides = (0, 0, 0, 0) if kv_scales is None else tuple(kv_scales.stride(i) for i in PLACE)
    norms = (inv_freq, inv_freq) if q_norm is None else (q_norm, k_norm)  # without norms never read
    groups = triton.cdiv(q_heads, q_block) + triton.cdiv(kv_heads, kv_block)
    _rope_write[(tokens, groups)](
        q, k, v, positions, inv_freq, *norms, eps, keys, scales, pages, slots,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *(frames.stride(i) for i in PLACE), *scale_strides,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, Q_BLOCK=q_block, KV_BLOCK=kv_block,
        HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2),
        NORM=q_norm is not None, LARGEST=0 if kv_scales is None else LARGEST[frames.dtype],
        num_warps=4 if most == HEADS else 2, enable_fp_fusion=True,
    )  # fmt: skip


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    tokens, _, head_dim = q.shape
    assert frames.dim() == 6 and frames.shape[3] == 2 and 0 <= layer < frames.shape[LAYER], (frames.shape, layer)
    assert k.shape == v.shape == (tokens, frames.shape[1], head_dim), (q.shape, k.shape, v.shape, frames.shape)
    assert head_dim % 2 == 0 and frames.shape[5] == head_dim, (q.shape, frames.shape)
    assert inv_freq.shape == (head_dim // 2,) and inv_freq.is_contiguous(), (inv_freq.shape, head_dim)
    assert inv_freq.dtype == torch.float32, inv_freq.dtype
    assert q.dtype == k.dtype == v.dtype and q.is_floating_point(), (q.dtype, k.dtype, v.dtype)
    for by_token in (positions, pages, slots):
        assert by_token.shape == (tokens,) and by_token.is_contiguous(), (by_token.shape, tokens)
    assert positions.dtype in (torch.int32, torch.int64), positions.dtype
    assert pages.dtype == slots.dtype == torch.int32, (pages.dtype, slots.dtype)
    for dense in (q, k, v, frames):
        assert dense.stride(-1) == 1, dense.stride()
    assert len({t.device for t in (q, k, v, positions, inv_freq, frames, pages, slots)}) == 1, "several devices"


def _check_options(
    q: torch.Tensor,
    frames: torch.Tensor,
    kv_scales: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    if kv_scales is None:
        assert frames.dtype == q.dtype, (frames.dtype, q.dtype)
    else:
        assert frames.dtype in LARGEST, frames.dtype
        assert kv_scales.shape == frames.shape[:5] and kv_scales.dtype == torch.float32, (kv_scales.shape, frames.shape)
        assert kv_scales.device == q.device, (kv_scales.device, q.device)
    assert (q_norm is None) == (k_norm is None), "both norms or none"
    for weight in (q_norm, k_norm):
        if weight is not None:
            assert weight.shape == q.shape[2:] and weight.dtype == q.dtype, (weight.shape, weight.dtype, q.shape)
            assert weight.device == q.device and weight.is_contiguous(), (weight.device, weight.stride())


def rope_write_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    slots: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """The same with one line per token."""
    wide_q, wide_k = q.float(), k.float()
    if q_norm is not None and k_norm is not None:
        wide_q = rms_norm_reference(wide_q, q_norm.float(), eps)
        wide_k = rms_norm_reference(wide_k, k_norm.float(), eps)
    turned_q = rope_reference(wide_q, positions, inv_freq)
    parts = (rope_reference(wide_k, positions, inv_freq), v.float())
    for token, (page, slot) in enumerate(zip(pages.tolist(), slots.tolist(), strict=True)):
        if page < 0:
            continue
        q[token] = turned_q[token].to(q.dtype)
        for part, values in enumerate(parts):
            stored = values[token]  # [K, D]
            if kv_scales is not None:
                largest = LARGEST[frames.dtype]
                scale = stored.abs().amax(-1).clamp(min=LEAST_MAGNITUDE.value) / largest
                kv_scales[page, :, layer, part, slot] = scale
                stored = (stored / scale[:, None]).clamp(-largest, largest)
                stored = stored.round() if frames.dtype == torch.int8 else stored
            frames[page, :, layer, part, slot] = stored.to(frames.dtype)
