"""Causal attention of many query tokens over pages: whole prompts, and chunks after a prefix that is cached already.

    q [T, H, D], frames [N, K, L, 2, P, D], layer, pages [R, W], starts [R], offsets [R + 1]  →  [T, H, D]

Row r owns the queries offsets[r] .. offsets[r + 1] - 1, at the positions starts[r] ..; its keys, those of the queries
included, lie in pages[r]. Query head h reads key/value head h // (H / K). A query at position p sees the keys
p - window + 1 .. p. Slots that no token was written to may hold NaN, and page numbers past a row's end, or wholly
before its windows, may be anything. Float8 and int8 pools come with kv_scales [N, K, L, 2, P]: value = stored x scale.

One program holds BLOCK_M rows of one KV head: all H/K query heads of BLOCK_M / (H/K) positions. Packed so, short chunks
fill a tile, and a tile spans few positions, so that little of its diagonal is computed in vain. It walks over key tiles
of BLOCK_N with the running maximum and sum of the softmax, base 2, in float32. Tiles that a window's edge or the
diagonal crosses are masked, in loops of their own; those between carry no mask at all. Tiles with the most keys start
first (`plan_prefill`), all of one KV head before the next, so that the programs in flight read the same keys.
A few tokens after a long prefix are too few tiles for a chip: then the context of each is cut into parts, which leave
sums in float32 for a second kernel (`choose_splits`).
Quantised keys and values are widened to the type of q before their products: Hopper's float8 products keep 14 bits of
a sum, those of bfloat16 keep float32, so that the second level of accumulation is not needed here.

On an H200 the limit is the tensor cores with the exponentials beside them: 128 rows against 128 keys of 128 elements
cost 2048 cycles of products and 1024 of exponentials, which overlap only as far as two warp groups drift apart. Reading
is not the limit: 8k tokens of one layer are 32 MB and stay in the L2 cache. Compiled for that chip the loop without
masks is some 600 instructions a tile, 16 of them asynchronous products of 64 x 128 x 16, with nothing spilled inside.
**Not measured: no figure of this kernel exists yet, and the defaults are untuned.**

Considered and left out:
- descriptors (TMA) for pages shorter than a tile: each page would be an operation of its own, and joining the blocks
  costs a pass through registers; descriptors that gather begin with Blackwell. They serve where BLOCK_N divides P.
- the next tile's scores begun before the softmax of this one: Triton 3.9 waits for them at once all the same.
- warp specialisation on Hopper: Triton 3.9 compiles this loop to the same code with and without it.
- one head per program: the same reads, more of the diagonal, and short chunks leave tiles empty.
- float8 products: half the time of a product at best, but q would be quantised and sums would lose bits.
- the scale of a value multiplied into its probability, as in decode: in float16 small probabilities would vanish.

`backend="library"` gathers each row's pages and calls torch's scaled_dot_product_attention, which picks flash, cuDNN or
FlashAttention-3 where that was activated. It needs a plan, whose host lists say how long the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.attention.bias import causal_lower_right
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_plan import Span
from kernels.gpu.chip import multiprocessors
from kernels.paged_attention import paged_attention_reference

LOG2_E = 1.4426950408889634
DESCRIPTOR_CAPABILITY = 9  # the first with TMA
SPECIALIZING_CAPABILITY = 10  # the first for which Triton gives copies and products of this loop warps of their own
MAX_SPLITS = 16
LEAST_SPLIT_TOKENS = 512  # of a part, by estimate: writing and reading its sums must cost less than its keys
HIDDEN = tl.constexpr(-1e30)  # a masked score: finite, so that no row needs a guard against inf - inf


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """What tuning may choose; nothing of it changes the result beyond rounding."""

    block_m: int = 128  # query rows of a program: positions x query heads of one KV head
    block_n: int = 128  # keys of a tile
    num_warps: int = 8
    num_stages: int = 2
    descriptors: bool = False  # read whole tiles by TMA where the pool allows it
    warp_specialize: bool = False  # let the compiler give copies and products warps of their own, where it can


def default_config(head_dim: int, dtype: torch.dtype, group: int = 1) -> PrefillConfig:
    """Untuned: sizes that fit the registers and the shared memory of an H200. `group`: H / K."""
    if dtype != torch.float32:
        chosen = PrefillConfig(block_n=64 if head_dim > 128 else 128)
    elif head_dim > 64:
        chosen = PrefillConfig(block_m=16, block_n=16) if head_dim > 128 else PrefillConfig(block_m=32, block_n=32)
    else:
        chosen = PrefillConfig(block_m=64, block_n=32, num_warps=4)
    return replace(chosen, block_m=max(chosen.block_m, triton.next_power_of_2(group)))


def tile_tokens(config: PrefillConfig, heads: int, kv_heads: int) -> int:
    """Positions of one program: what plan_prefill is told."""
    assert heads % kv_heads == 0 and heads // kv_heads <= config.block_m, (heads, kv_heads, config)
    return config.block_m // (heads // kv_heads)


class PrefillPlan(NamedTuple):
    """Which program does what, for every layer of a step."""

    tiles: torch.Tensor  # [n, 2] int32: row, tile of the row; those with the most keys first
    tokens: int  # positions of a tile
    starts: tuple[int, ...]  # [R] on the host
    offsets: tuple[int, ...]  # [R + 1] on the host


def plan_prefill(
    starts: Sequence[int], offsets: Sequence[int], block_m: int, device: torch.device | str = "cpu"
) -> PrefillPlan:
    """Tiles of `block_m` positions (`tile_tokens`) over all rows, from host lists. Rows of no token have no tile.

    The copy is asked for without waiting. Whoever keeps pinned memory makes the plan on the CPU and replaces `tiles`.
    """
    assert block_m > 0 and len(offsets) == len(starts) + 1 and offsets[0] == 0, (block_m, len(starts), len(offsets))
    found = []
    for row, start in enumerate(starts):
        length = offsets[row + 1] - offsets[row]
        assert start >= 0 and length >= 0, (row, start, length)
        for tile in range(-(-length // block_m)):
            found.append((start + min((tile + 1) * block_m, length), row, tile))
    found.sort(reverse=True)
    tiles = torch.tensor([(row, tile) for _, row, tile in found], dtype=torch.int32).view(-1, 2)
    return PrefillPlan(tiles.to(device, non_blocking=True), block_m, tuple(starts), tuple(offsets))


def prefill_attention_reference(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
    window: int | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D] float32: token by token, from widened values."""
    wide = frames.float() if kv_scales is None else frames.float() * kv_scales[..., None]
    lengths = offsets.diff().tolist()
    rows = zip(pages.tolist(), starts.tolist(), lengths, strict=True)
    return paged_attention_reference(q.float(), wide, layer, [Span(*row) for row in rows], scale, window)


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    """acc + a b; of float32 in three products of tfloat32, which keep all but its last bits.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers: there, widened.
    """
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _tiles(
    acc, total, peak, q, position, keys, values, key_scales, value_scales, key_rows, value_rows, page_list, first, last,
    low, high, window, score_scale, page_stride, token_stride, scale_page, scale_token, page_rows, head_row,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, QUANTISED: tl.constexpr, DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the keys of the tiles from `first` to below `last`; of a masked tile only [low, high) is read."""
    column = tl.arange(0, DP)
    for tile in tl.range(first, last, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        n = tile + tl.arange(0, BLOCK_N)
        read = (n >= low) & (n < high)
        if MASKED:
            page = tl.load(page_list + n // P, mask=read, other=0).to(tl.int64)
        else:
            page = tl.load(page_list + n // P).to(tl.int64)
        slot = n % P
        block = (page * page_stride + slot * token_stride)[:, None] + column[None, :]
        inside = read[:, None] & (column < D)[None, :]

        if MASKED:
            k = tl.load(keys + block, mask=inside, other=0.0)
        elif DESCRIPTORS:
            row = tl.load(page_list + tile // P) * page_rows + head_row + tile % P
            k = key_rows.load([row, 0])
        elif D == DP:
            k = tl.load(keys + block)
        else:
            k = tl.load(keys + block, mask=(column < D)[None, :], other=0.0)
        if QUANTISED:
            k = k.to(tl.float32).to(q.dtype)  # exact
        score = _product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), WIDEN)
        if QUANTISED:
            scale_at = page * scale_page + slot * scale_token
            score *= tl.load(key_scales + scale_at, mask=read, other=0.0)[None, :]
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOWED:
                seen &= n[None, :] > position[:, None] - window
            score = tl.where(seen, score, HIDDEN)

        higher = tl.maximum(peak, tl.max(score, 1) * score_scale)
        share = tl.exp2(score * score_scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        peak = higher
        total = total * shrink + tl.sum(share, 1)
        acc = acc * shrink[:, None]

        if MASKED:
            v = tl.load(values + block, mask=inside, other=0.0)
        elif DESCRIPTORS:
            row = tl.load(page_list + tile // P) * page_rows + head_row + tile % P
            v = value_rows.load([row, 0])
        elif D == DP:
            v = tl.load(values + block)
        else:
            v = tl.load(values + block, mask=(column < D)[None, :], other=0.0)
        if QUANTISED:
            scale_at = page * scale_page + slot * scale_token
            v = (v.to(tl.float32) * tl.load(value_scales + scale_at, mask=read, other=0.0)[:, None]).to(q.dtype)
        acc = _product(share.to(q.dtype), v, acc, WIDEN)
    return acc, total, peak


@triton.jit(
    do_not_specialize=["tiles_per_row", "window", "score_scale", "pages_row", "tokens", "heads"],
    do_not_specialize_on_alignment=["pages", "starts", "offsets", "tiles"],
)
def _prefill_kernel(
    q, out, sums, peaks, keys, values, key_scales, value_scales, key_rows, value_rows, pages, starts, offsets, tiles,
    tokens, heads, tiles_per_row, window, score_scale, q_token, q_head, out_token, out_head, page_stride, head_stride,
    token_stride, scale_page, scale_head, scale_token, page_rows, head_rows, pages_row,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PLANNED: tl.constexpr, WINDOWED: tl.constexpr, QUANTISED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, K, SPLITS). Of several parts each leaves its sums, and `_combine_kernel` ends the work."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    if PLANNED:
        row = tl.load(tiles + 2 * program)
        tile = tl.load(tiles + 2 * program + 1)
    else:
        row = program // tiles_per_row
        tile = tiles_per_row - 1 - program % tiles_per_row  # the one with the most keys first
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    row_token = tl.load(offsets + row)
    left = tl.load(offsets + row + 1) - row_token - tile * TOKENS  # tokens of the row from this tile on
    if left <= 0:
        return
    start = tl.load(starts + row) + tile * TOKENS
    final = start + tl.minimum(left, TOKENS) - 1  # the position of the tile's last query

    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DP)
    token = m // GROUP
    head = kv_head * GROUP + m % GROUP
    used = (token < TOKENS) & (token < left)
    cell = used[:, None] & (column < D)[None, :]
    first_token = (row_token + tile * TOKENS).to(tl.int64)
    q += first_token * q_token
    queries = tl.load(q + (token * q_token + head * q_head)[:, None] + column[None, :], mask=cell, other=0.0)
    position = tl.minimum(start + token, final)  # unused rows do as the last query does, and store nothing

    wide_head = kv_head.to(tl.int64)
    keys += wide_head * head_stride
    values += wide_head * head_stride
    if QUANTISED:
        key_scales += wide_head * scale_head
        value_scales += wide_head * scale_head
    head_row = kv_head * head_rows
    page_list = pages + row.to(tl.int64) * pages_row

    acc = tl.zeros([BLOCK_M, DP], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    low = 0
    begin = 0
    high = final + 1
    whole = (start + 1) // BLOCK_N * BLOCK_N  # below it every query sees every key, the window apart
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0)
        begin = low // BLOCK_N * BLOCK_N
    end = high
    split = tl.program_id(2)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, high)  # may lie before begin: a part without keys
    if WINDOWED:
        edge = tl.cdiv(tl.maximum(final - window + 1, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(tl.minimum(edge, whole), end)  # from it on the window reaches every key
        acc, total, peak = _tiles(
            acc, total, peak, queries, position, keys, values, key_scales, value_scales, key_rows, value_rows,
            page_list, begin, edge, low, high, window, score_scale, page_stride, token_stride, scale_page, scale_token,
            page_rows, head_row, D, DP, P, BLOCK_N, True, WINDOWED, QUANTISED, DESCRIPTORS, False, WIDEN,
        )  # fmt: skip
        begin = tl.maximum(begin, edge)
    acc, total, peak = _tiles(
        acc, total, peak, queries, position, keys, values, key_scales, value_scales, key_rows, value_rows,
        page_list, begin, tl.minimum(whole, end), low, high, window, score_scale, page_stride, token_stride,
        scale_page, scale_token, page_rows, head_row, D, DP, P, BLOCK_N, False, WINDOWED, QUANTISED, DESCRIPTORS,
        WARP_SPECIALIZE, WIDEN,
    )  # fmt: skip
    acc, total, peak = _tiles(
        acc, total, peak, queries, position, keys, values, key_scales, value_scales, key_rows, value_rows,
        page_list, tl.maximum(whole, begin), end, low, high, window, score_scale, page_stride, token_stride,
        scale_page, scale_token, page_rows, head_row, D, DP, P, BLOCK_N, True, WINDOWED, QUANTISED, DESCRIPTORS,
        False, WIDEN,
    )  # fmt: skip
    if SPLITS == 1:
        mixed = (acc / total[:, None]).to(out.dtype.element_ty)
        out += first_token * out_token
        tl.store(out + (token * out_token + head * out_head)[:, None] + column[None, :], mixed, mask=cell)
    else:
        cells = (split * tokens + first_token + token) * heads + head  # in [SPLITS, T, H]
        tl.store(sums + (cells * D)[:, None] + column[None, :], acc, mask=cell)
        tl.store(peaks + 2 * cells, peak, mask=used)
        tl.store(peaks + 2 * cells + 1, total, mask=used)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _combine_kernel(
    out, sums, peaks, tokens, heads, out_token, out_head, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr
):
    """Grid (T, H)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, DP)
    highest = tl.load(peaks + 2 * (token * heads + head))
    for split in tl.static_range(1, SPLITS):
        highest = tl.maximum(highest, tl.load(peaks + 2 * ((split * tokens + token) * heads + head)))
    acc = tl.zeros([DP], dtype=tl.float32)
    total = 0.0
    for split in tl.static_range(SPLITS):
        cell = (split * tokens + token) * heads + head
        weight = tl.exp2(tl.load(peaks + 2 * cell) - highest)
        total += weight * tl.load(peaks + 2 * cell + 1)
        acc += weight * tl.load(sums + cell * D + column, mask=column < D, other=0.0)
    mixed = (acc / total).to(out.dtype.element_ty)
    tl.store(out + token * out_token + head * out_head + column, mixed, mask=column < D)


def choose_splits(plan: PrefillPlan, kv_heads: int, multiprocessor_count: int) -> int:
    """Parts of each tile's context: 1 where the tiles fill the chip; else as many as fit, none of few keys."""
    programs = len(plan.tiles) * kv_heads
    if programs == 0:
        return 1
    longest = max(start + plan.offsets[row + 1] - plan.offsets[row] for row, start in enumerate(plan.starts))
    return max(1, min(multiprocessor_count // programs, longest // LEAST_SPLIT_TOKENS, MAX_SPLITS))


def prefill_attention(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
    window: int | None = None,
    max_tokens: int | None = None,
    out: torch.Tensor | None = None,
    *,
    kv_scales: torch.Tensor | None = None,
    plan: PrefillPlan | None = None,
    config: PrefillConfig | None = None,
    splits: int | None = None,
    backend: Literal["triton", "library"] = "triton",
) -> torch.Tensor:
    """[T, H, D]. Nothing waits for the device.

    Without a plan each row gets as many programs as `max_tokens` (T when None) needs, and those past its end return.
    `splits`: parts of each tile's context; None: by choose_splits, or 1 without a plan.
    """
    _check(q, frames, layer, scale, window, kv_scales)
    _check_lists(q, pages, starts, offsets, plan)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.shape == q.shape and out.dtype == q.dtype and out.stride(2) == 1, (out.shape, out.dtype, out.stride())
    assert out.device == q.device, (out.device, q.device)
    if backend == "library":
        assert plan is not None, "backend library needs a plan"
        return _library(q, frames, layer, pages, scale, window, kv_scales, plan, out)
    assert backend == "triton", backend
    tokens, heads, head_dim = q.shape
    kv_heads, rows = frames.shape[1], len(pages)
    config = config or default_config(head_dim, q.dtype, heads // kv_heads)
    per_tile = tile_tokens(config, heads, kv_heads)
    assert plan is None or plan.tokens == per_tile, f"the plan was made for other tiles than of {per_tile} tokens"
    per_row = triton.cdiv(tokens if max_tokens is None else max_tokens, per_tile)
    programs = rows * per_row if plan is None else len(plan.tiles)
    if programs == 0:
        return out
    if splits is None:
        splits = 1 if plan is None else choose_splits(plan, kv_heads, multiprocessors(q.device))
    assert 1 <= splits <= MAX_SPLITS, splits
    parts = (splits, tokens, heads) if splits > 1 else (0,)
    sums = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    peaks = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
    described = config.descriptors and _takes_descriptors(frames, config.block_n)
    padded_dim = triton.next_power_of_2(head_dim)
    keys, values = frames[:, :, layer, 0], frames[:, :, layer, 1]
    scales = None if kv_scales is None else kv_scales[:, :, layer]
    _prefill_kernel[programs, kv_heads, splits](
        q, out, sums, peaks, keys, values,
        None if scales is None else scales[:, :, 0],
        None if scales is None else scales[:, :, 1],
        _descriptor(keys, config.block_n, padded_dim) if described else None,
        _descriptor(values, config.block_n, padded_dim) if described else None,
        pages, starts, offsets, None if plan is None else plan.tiles,
        tokens, heads, per_row, window or 0, scale * LOG2_E, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        frames.stride(0), frames.stride(1), frames.stride(4),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        0 if scales is None else scales.stride(3),
        frames.stride(0) // head_dim if described else 0,
        frames.stride(1) // head_dim if described else 0,
        pages.stride(0),
        GROUP=heads // kv_heads, D=head_dim, DP=padded_dim, P=frames.shape[4],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLITS=splits,
        PLANNED=plan is not None, WINDOWED=window is not None, QUANTISED=kv_scales is not None, DESCRIPTORS=described,
        WARP_SPECIALIZE=config.warp_specialize and _capability(q.device) >= SPECIALIZING_CAPABILITY,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[tokens, heads](
            out, sums, peaks, tokens, heads, out.stride(0), out.stride(1), D=head_dim, DP=padded_dim, SPLITS=splits,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(
    q: torch.Tensor, frames: torch.Tensor, layer: int, scale: float, window: int | None, kv_scales: torch.Tensor | None
) -> None:
    assert q.dim() == 3 and q.stride(2) == 1, (q.shape, q.stride())
    assert frames.dim() == 6 and frames.stride(5) == 1, (frames.shape, frames.stride())
    head_dim, kv_heads = frames.shape[5], frames.shape[1]
    assert q.shape[2] == head_dim and head_dim % 8 == 0 and q.shape[1] % kv_heads == 0, (q.shape, frames.shape)
    assert 0 <= layer < frames.shape[2] and scale > 0 and (window is None or window > 0), (layer, scale, window)
    assert q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.device == frames.device, (q.dtype, q.device)
    if kv_scales is None:
        assert q.dtype == frames.dtype, (q.dtype, frames.dtype)
        return
    assert frames.dtype in (torch.float8_e4m3fn, torch.int8) and kv_scales.dtype == torch.float32, frames.dtype
    assert kv_scales.shape == frames.shape[:5] and kv_scales.device == q.device, (kv_scales.shape, frames.shape)


def _check_lists(
    q: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor, offsets: torch.Tensor, plan: PrefillPlan | None
) -> None:
    rows = len(pages)
    assert pages.dim() == 2 and pages.stride(1) == 1, (pages.shape, pages.stride())
    assert starts.shape == (rows,) and offsets.shape == (rows + 1,), (pages.shape, starts.shape, offsets.shape)
    for name, numbers in (("pages", pages), ("starts", starts), ("offsets", offsets)):
        assert numbers.dtype == torch.int32 and numbers.device == q.device, (name, numbers.dtype, numbers.device)
        assert numbers.stride(-1) == 1, (name, numbers.stride())
    if plan is not None:
        assert len(plan.starts) == rows and plan.offsets[-1] == len(q), (rows, len(q), plan.offsets)
        assert plan.tiles.device == q.device and plan.tiles.dtype == torch.int32, (plan.tiles.device, plan.tiles.dtype)


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _takes_descriptors(frames: torch.Tensor, block_n: int) -> bool:
    """Whether a tile of keys is one block of rows of D elements, and the device can copy it as such."""
    head_dim, page_size = frames.shape[5], frames.shape[4]
    if frames.is_cuda and _capability(frames.device) < DESCRIPTOR_CAPABILITY:
        return False
    dense = frames.stride(4) == head_dim and all(frames.stride(dim) % head_dim == 0 for dim in range(4))
    aligned = head_dim * frames.element_size() % 16 == 0 and frames.data_ptr() % 16 == 0
    return page_size % block_n == 0 and dense and aligned and _reach(frames[:, :, 0, 0]) // head_dim < 2**31


def _reach(part: torch.Tensor) -> int:
    """Elements from the first to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))


def _descriptor(part: torch.Tensor, block_n: int, padded_dim: int) -> TensorDescriptor:
    """Rows of D over one layer's keys or values [N, K, P, D], whatever lies between them."""
    head_dim = part.shape[3]
    return TensorDescriptor(part, [_reach(part) // head_dim, head_dim], [head_dim, 1], [block_n, padded_dim])


def _library(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    scale: float,
    window: int | None,
    kv_scales: torch.Tensor | None,
    plan: PrefillPlan,
    out: torch.Tensor,
) -> torch.Tensor:
    """Row by row: its pages gathered into dense keys and values, then torch's fused attention."""
    page_size = frames.shape[4]
    for row, start in enumerate(plan.starts):
        first, last = plan.offsets[row], plan.offsets[row + 1]
        if first == last:
            continue
        end = start + last - first
        low = 0 if window is None else max(0, start - window + 1)  # what lies before may be NaN, also in its page
        origin = low // page_size * page_size
        own = pages[row, low // page_size : triton.cdiv(end, page_size)]
        pair = frames[:, :, layer].index_select(0, own)  # [n, K, 2, P, D]
        if kv_scales is not None:
            pair = pair.float() * kv_scales[:, :, layer].index_select(0, own)[..., None]
        pair = pair.to(q.dtype).permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, low - origin : end - origin]  # [2, K, S, D]
        query = q[first:last].transpose(0, 1)
        mask = _mask(start - low, last - first, window, q.device)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query[None], pair[0][None], pair[1][None], attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[first:last].copy_(mixed[0].transpose(0, 1))
    return out


def _mask(start: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Queries at start .. start + length - 1 against keys 0 .. start + length - 1."""
    if window is None:
        return causal_lower_right(length, start + length)
    query = torch.arange(start, start + length, device=device)[:, None]
    key = torch.arange(start + length, device=device)
    return (key <= query) & (key > query - window)
