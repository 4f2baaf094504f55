"""Attention of one to eight new tokens of each row over the row's pages: the decode step, and its verification.

    q [R, M, H, D], frames [N, K, L, 2, P, D], layer, pages [R, W] int32, lengths [R] int32  →  out [R, M, H, D]

Query m of row r stands at position lengths[r] - M + m and sees keys up to its own, the last `window` of them where
there is a window; its own key has been written before. Query head h reads key/value head h // (H / K). A row of length
0 (the padding of a graph) gives zeros. What lies in slots beyond the length or before the window, and what the page
table says of them, is never used. Frames hold the type of q, or float8_e4m3fn or int8 with `kv_scales`
[N, K, L, 2, P] float32, none negative: value = stored * scale.

One program takes one row, one key/value head and one part of the context. Its H / K * M queries share each key that is
read. Keys come in tiles that may span several pages, or a part of one. Rows are cut by their own length on the device:
the grid depends on shapes alone, so that a captured graph serves all lengths, and the result of a row depends on the
number of splits, not on the rows beside it. A row of which only one part lives writes `out` itself; the second kernel
weighs the parts of the others together, and is not launched where no row can have two.

What limits it on an H200: each element is read once and multiplied 2 * H / K * M times, far below the chip's balance,
also after padding to the 16 rows of a tensor-core product. So the bytes of keys and values bound it, and what costs is
too few bytes in flight: 4.8 TB/s at about a microsecond of latency need some 35 KB for each of the 132 multiprocessors.
Hence at least two programs for each, tiles of 32 KB with the next ones under way (asynchronous copies, `num_stages`),
the ids of the next tile's pages read one tile ahead so that no copy waits for an id, one 64-bit offset per key shared
by K and V, and no copy of slots that hold no key. Warps meet once per tile for the largest score; the sum of the
probabilities waits for the end. Short contexts are bound by latency: the first ids, the first tile, the second launch.

With 8-bit pools instructions come next after the bytes. Keys and values are read as words of two elements and widened
to float16, which holds both types exactly: see _widen. Scales multiply scores and probabilities, once per key instead
of once per element. The queries are brought into -1..1 first, and the softmax runs below the largest score that is
weighed by its value's scale, so that probability times scale stays within 0..1, and float16 suffices for both.
Accumulation has two levels, both float32: the products of a tile, and the running sum over tiles.

Rejected, by reasoning and by reading the code that the compiler makes for compute capability 9.0:
  products in 8 bits       queries and probabilities would keep 4 bits, for arithmetic that is not what bounds
  bulk-tensor copies       a tile would be bound to the page size, and 16-token pages make many small boxes
  equal shares of all      each program as many tiles as any other, of whichever rows: balances ragged batches best, but
                           a row's sums would follow its neighbours
  the last part combines   saves a launch, and wants an acquire and a release that no interpreter can check
  keys as the left side    fills the wider product with few queries; the probabilities pass shared memory all the same
Nothing here has been measured on a GPU, and the default configuration is untuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from kernels.attention_plan import Span
from kernels.gpu.chip import multiprocessors
from kernels.paged_attention import paged_attention_reference

MAX_QUERY_TOKENS = 8
MAX_SPLITS = 128
PROGRAMS_PER_SM = 2  # at least, in the grid of the first kernel
LEAST_SPLIT_TOKENS = 256  # below it, a split's fixed costs outweigh what it saves
LONGEST_SPLIT_TOKENS = 16384  # a full grid still cuts rows longer than this, or one row would outlast all others
TILE_BYTES = 32768  # of keys and values together: three stages of it leave room for two programs on a multiprocessor
VECTOR_BYTES = 16  # the widest access of a thread
COMBINE_BLOCK = 16  # parts that the second kernel reads at a time
QUANTISED_TYPES = (torch.float8_e4m3fn, torch.int8)
QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1 / math.log(2)
LEAST_EXPONENT = tl.constexpr(-64)  # of any scale in use; its inverse, summed over all keys, is a float32

# What _widen does, two words (a0 a1, b0 b1) at a time: their low bytes (a0 b0) and their high ones (a1 b1).
E4M3_PAIRS = tl.constexpr("""
{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}
""")
INT8_PAIRS = tl.constexpr("""
{
    .reg .b32 positive, wide, middle;
    mov.b32 middle, 0x64806480;
    xor.b32 positive, $2, 0x80808080;
    prmt.b32 wide, positive, 0x64646464, 0x4240;
    sub.f16x2 $0, wide, middle;
    prmt.b32 wide, positive, 0x64646464, 0x4341;
    sub.f16x2 $1, wide, middle;
}
""")


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """What tuning may choose. The result differs by rounding only."""

    block_keys: int = 64  # keys of a tile: a power of two, at least 16
    num_warps: int = 4
    num_stages: int = 3
    splits: int | None = None  # most parts of a row; None: by choose_splits
    assembly: bool = True  # two words of 8-bit elements are widened at a time, in PTX where the chip has it


class SplitPlan(NamedTuple):
    splits: int  # of each row at most; the grid's last dimension
    least_tiles: int  # of one part, but for a row's last


def default_config(head_dim: int, element_size: int, query_rows: int) -> DecodeConfig:
    """Untuned. `query_rows`: H / K * M; `element_size`: bytes of a stored element.

    No more keys than registers hold: of 8 bits they are there twice, once widened, and float32 is multiplied outside
    the tensor cores.
    """
    width, many = triton.next_power_of_2(head_dim), query_rows > 64
    keys = (TILE_BYTES // 2 if element_size == 4 else TILE_BYTES) // (2 * width * element_size)
    most = 128
    if element_size == 1 and (many or width <= 64):
        most = min(64, 8192 // width)
    elif element_size == 4 and many:
        most = 16
    return DecodeConfig(block_keys=min(most, max(16, keys)), num_warps=8 if many else 4)


def choose_splits(blocks: int, bound_tokens: int, sm_count: int, block_keys: int) -> SplitPlan:
    """Enough parts to fill the chip, without a last wave that is nearly empty.

    `blocks`: R * K; `bound_tokens`: most keys that a row may see (W * P, or less with a window).
    """
    slots = PROGRAMS_PER_SM * sm_count
    if blocks >= slots:
        longest = max(1, LONGEST_SPLIT_TOKENS // block_keys)
        return SplitPlan(min(MAX_SPLITS, max(1, triton.cdiv(bound_tokens, longest * block_keys))), longest)
    least = max(1, LEAST_SPLIT_TOKENS // block_keys)
    most = min(MAX_SPLITS, max(1, triton.cdiv(bound_tokens, least * block_keys)))
    fill = triton.cdiv(slots, max(1, blocks))
    if fill >= most:
        return SplitPlan(most, least)

    def idle_share(splits: int) -> float:
        waves = blocks * splits / slots
        return 1 - waves / math.ceil(waves)

    return SplitPlan(min(range(fill, min(2 * fill, most) + 1), key=idle_share), least)


def decode_attention_reference(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, M, H, D] float32: token by token, from widened values."""
    wide = frames[:, :, layer : layer + 1].float()
    if kv_scales is not None:
        wide = wide * kv_scales[:, :, layer : layer + 1, ..., None]
    out = torch.zeros_like(q, dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):
        if length:
            span = Span(pages[row].tolist(), length - q.shape[1], q.shape[1])
            out[row] = paged_attention_reference(q[row].float(), wide, 0, [span], scale, window)
    return out


def decode_attention(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    kv_scales: torch.Tensor | None = None,
    splits: int | None = None,
    out: torch.Tensor | None = None,
    *,
    config: DecodeConfig | None = None,
    sm_count: int | None = None,
) -> torch.Tensor:
    """[R, M, H, D] in the type of q. `lengths` [R] counts keys, those of the M queries included: 0, or at least M.

    `splits` sets the most parts of a row, whatever `config` says. `sm_count`: the device's, unless given.
    """
    rows, tokens, heads, head_dim = q.shape
    kv_heads, page_size = frames.shape[1], frames.shape[4]
    _check(q, frames, layer, pages, lengths, window, kv_scales)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1, (out.shape, out.dtype, out.stride())
    if rows == 0:
        return out
    query_rows = heads // kv_heads * tokens
    if config is None:
        config = default_config(head_dim, frames.element_size(), query_rows)
    if splits is not None:
        config = replace(config, splits=splits)
    plan = _plan(config, rows * kv_heads, pages.shape[1] * page_size, tokens, window, sm_count, q.device)
    parts = (rows, kv_heads, plan.splits, query_rows)
    of_layer = frames[:, :, layer]  # [N, K, 2, P, D]
    if kv_scales is not None:
        of_layer = of_layer.view(torch.int16)  # [N, K, 2, P, D / 2] words
    scales = None if kv_scales is None else kv_scales[:, :, layer]  # [N, K, 2, P]
    aligned = math.gcd(VECTOR_BYTES // of_layer.element_size(), *of_layer.stride()[:4])
    split = plan.splits > 1
    rounded = _rounded_type(q.dtype, scales is not None)
    mixed = torch.empty((*parts, head_dim) if split else 1, dtype=torch.float32, device=q.device)
    weights = torch.empty(parts if split else 1, dtype=torch.float32, device=q.device)
    shape = {
        "TOKENS": tokens,
        "SHARE": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_KEYS": config.block_keys,
        "WINDOWED": window is not None,
    }
    _attend_part[(kv_heads, rows, plan.splits)](
        q, of_layer, pages, lengths, scales, out, mixed, weights,
        q.stride(0), q.stride(1), q.stride(2),
        *(stride // aligned for stride in of_layer.stride()[:4]),
        pages.stride(0),
        *((0, 0, 0, 0) if scales is None else scales.stride()),
        out.stride(0), out.stride(1), out.stride(2),
        scale * LOG2_E, window or 0, plan.splits, plan.least_tiles,
        ALIGNED=aligned, PAGE_SIZE=page_size, BLOCK_ROWS=max(16, triton.next_power_of_2(query_rows)),
        QUANTISED=scales is not None, INTEGER=frames.dtype == torch.int8, SPLIT=split,
        ROUNDED=rounded, PRODUCT=tl.float32 if rounded == tl.bfloat16 and knobs.runtime.interpret else rounded,
        ASSEMBLY=config.assembly and _has_conversion(q.device),
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        **shape,
    )  # fmt: skip
    if split:
        _combine_parts[(tokens * heads, rows)](
            mixed, weights, lengths, out,
            out.stride(0), out.stride(1), out.stride(2),
            window or 0, plan.splits, plan.least_tiles,
            BLOCK_PARTS=COMBINE_BLOCK, num_warps=2, enable_fp_fusion=True,
            **shape,
        )  # fmt: skip
    return out


def _check(
    q: torch.Tensor,
    frames: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None,
    kv_scales: torch.Tensor | None,
) -> None:
    rows, tokens, heads, head_dim = q.shape
    assert frames.dim() == 6 and frames.shape[3] == 2 and frames.shape[5] == head_dim, (q.shape, frames.shape)
    assert heads % frames.shape[1] == 0 and head_dim % 8 == 0 and 8 <= head_dim <= 256, (q.shape, frames.shape)
    assert 1 <= tokens <= MAX_QUERY_TOKENS and 0 <= layer < frames.shape[2], (tokens, layer)
    assert pages.dim() == 2 and pages.shape[0] == rows == lengths.shape[0], (rows, pages.shape, lengths.shape)
    assert pages.dtype == lengths.dtype == torch.int32, (pages.dtype, lengths.dtype)
    assert q.stride(3) == frames.stride(5) == pages.stride(1) == lengths.stride(0) == 1, "last dimensions are dense"
    assert rows < 1 << 16 and (window is None or window > 0), (rows, window)
    assert q.dtype in QUERY_TYPES, q.dtype
    if kv_scales is None:
        assert frames.dtype == q.dtype, (q.dtype, frames.dtype)
    else:
        assert frames.dtype in QUANTISED_TYPES and kv_scales.dtype == torch.float32, (frames.dtype, kv_scales.dtype)
        assert kv_scales.shape == frames.shape[:5], (kv_scales.shape, frames.shape)
    others = (frames, pages, lengths) if kv_scales is None else (frames, pages, lengths, kv_scales)
    assert all(other.device == q.device for other in others), "all on one device"


def _plan(
    config: DecodeConfig,
    blocks: int,
    table_tokens: int,
    tokens: int,
    window: int | None,
    sm_count: int | None,
    device: torch.device,
) -> SplitPlan:
    if config.splits is not None:
        assert 1 <= config.splits <= MAX_SPLITS, config.splits
        return SplitPlan(config.splits, 1)
    bound = table_tokens if window is None else min(table_tokens, window + tokens - 1)
    return choose_splits(blocks, bound, multiprocessors(device) if sm_count is None else sm_count, config.block_keys)


def _rounded_type(of_queries: torch.dtype, quantised: bool) -> tl.dtype:
    """The type of both sides of the products. Triton's interpreter multiplies bfloat16 as if it were integers."""
    if of_queries == torch.float32:
        return tl.float32
    return tl.float16 if quantised or of_queries == torch.float16 else tl.bfloat16


def _has_conversion(device: torch.device) -> bool:
    """From two float8_e4m3fn to two float16 in one instruction: since compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _row_parts(
    length, window, splits, least_tiles, TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr, WINDOWED: tl.constexpr
):
    """The first key that a row's queries see, the first tile, the tiles of a part, the parts that have any."""
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - TOKENS - window + 1, 0)
    first = lowest // BLOCK_KEYS
    tiles = tl.cdiv(length, BLOCK_KEYS) - first
    share = tl.maximum(tl.cdiv(tiles, splits), least_tiles)
    return lowest, first, share, tl.cdiv(tiles, share)


@triton.jit
def _widen(words, INTEGER: tl.constexpr, PRODUCT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The elements in the low and in the high bytes of 16-bit words: those of even and of odd dimensions.

    Tensor cores want pairs of keys of one dimension. The hardware transposes 16-bit elements on their way from shared
    memory; bytes it would fetch one by one. An integer becomes the low bits of a float16 between 1024 and 1279.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            INT8_PAIRS if INTEGER else E4M3_PAIRS, "=r,=r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif INTEGER:
        low = ((words & 255) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        high = (((words >> 8) & 255) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    else:
        low = (words & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        high = ((words >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return low.to(PRODUCT), high.to(PRODUCT)


@triton.jit(do_not_specialize=["table_row", "window", "splits", "least_tiles"])
def _attend_part(
    q, frames, pages, lengths, kv_scales, out, mixed, weights,
    q_row, q_token, q_head,
    frame_page, frame_head, frame_part, frame_slot,
    table_row,
    scale_page, scale_head, scale_part, scale_slot,
    out_row, out_token, out_head,
    score_scale, window, splits, least_tiles,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    WINDOWED: tl.constexpr, QUANTISED: tl.constexpr, INTEGER: tl.constexpr, SPLIT: tl.constexpr,
    ROUNDED: tl.constexpr, PRODUCT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Queries of one row and head against one part of the row's keys; q's rows are token-major: m * SHARE + g.

    An element that is loaded is a word: a dimension, or two where quantised. Strides of frames count ALIGNED words,
    which is how the compiler learns that it may copy as many at once.
    """
    PER_WORD: tl.constexpr = 2 if QUANTISED else 1
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths + row)
    lowest, first, share, live = _row_parts(length, window, splits, least_tiles, TOKENS, BLOCK_KEYS, WINDOWED)
    if (part > 0) & (part >= live):  # part 0 of a row of length 0 writes its zeros
        return

    index = tl.arange(0, BLOCK_ROWS)
    word = tl.arange(0, BLOCK_DIM // PER_WORD)
    whole = word < HEAD_DIM // PER_WORD
    token, query_head = index // SHARE, head * SHARE + index % SHARE
    real = index < TOKENS * SHARE
    q_at = row * q_row + token * q_token + query_head * q_head
    query_at = q + q_at[:, None] + (word * PER_WORD)[None, :]
    factor = tl.full([BLOCK_ROWS], score_scale, tl.float32)
    low = tl.load(query_at, mask=real[:, None] & whole[None, :], other=0.0)
    if QUANTISED:
        low = low.to(tl.float32)
        high = tl.load(query_at + 1, mask=real[:, None] & whole[None, :], other=0.0).to(tl.float32)
        widest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        widest = tl.where(widest > 0, widest, 1.0)
        factor = factor * widest
        low = low / widest[:, None]
        high = (high / widest[:, None]).to(PRODUCT)
        high_acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM // PER_WORD], tl.float32)
    low = low.to(PRODUCT)
    low_acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM // PER_WORD], tl.float32)

    position = length - TOKENS + token
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)  # running maximum of the scores, as powers of two
    sums = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)  # added up at the end: warps need not meet for it in the loop
    table = pages + row * table_row
    keys = frames + head.to(tl.int64) * frame_head * ALIGNED
    begin = (first + part * share) * BLOCK_KEYS
    end = tl.minimum((first + (part + 1) * share) * BLOCK_KEYS, length)
    key = begin + tl.arange(0, BLOCK_KEYS)
    page = tl.load(table + key // PAGE_SIZE, mask=(key >= lowest) & (key < end), other=0)
    for start in tl.range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        held = key < length
        if WINDOWED:
            held = held & (key >= lowest)
        slot = key.to(tl.uint32) % PAGE_SIZE
        at = (page.to(tl.int64) * frame_page + slot * frame_slot) * ALIGNED
        loaded = held[:, None] & whole[None, :]
        tile = tl.load(keys + at[:, None] + word[None, :], mask=loaded, other=0)
        if QUANTISED:
            scale_at = kv_scales + head.to(tl.int64) * scale_head + page.to(tl.int64) * scale_page + slot * scale_slot
            low_tile, high_tile = _widen(tile, INTEGER, PRODUCT, ASSEMBLY)
            scores = tl.dot(low, tl.trans(low_tile), input_precision="ieee")
            scores = tl.dot(high, tl.trans(high_tile), scores, input_precision="ieee")
            scores = scores * factor[:, None] * tl.load(scale_at, mask=held, other=0.0)[None, :]
        else:
            scores = tl.dot(low, tl.trans(tile.to(PRODUCT)), input_precision="ieee") * factor[:, None]
        page = tl.load(table + (key + BLOCK_KEYS).to(tl.uint32) // PAGE_SIZE, mask=key + BLOCK_KEYS < end, other=0)

        seen = held[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        weighed = scores
        if QUANTISED:
            value_scale = tl.load(scale_at + scale_part, mask=held, other=0.0)
            exponent = (value_scale.to(tl.int32, bitcast=True) >> 23) - 126  # of a power of two that exceeds it
            weighed = scores + tl.maximum(exponent, LEAST_EXPONENT).to(tl.float32)[None, :]
        above = tl.maximum(top, tl.max(weighed, 1))
        level = tl.where(above == float("-inf"), 0.0, above)  # a query that has seen no key yet
        shrink = tl.exp2(top - level)[:, None]
        probabilities = tl.exp2(scores - level[:, None])
        sums = sums * shrink + probabilities
        top = above

        tile = tl.load(keys + frame_part * ALIGNED + at[:, None] + word[None, :], mask=loaded, other=0)
        if QUANTISED:
            probabilities = (probabilities * value_scale[None, :]).to(PRODUCT)
            low_tile, high_tile = _widen(tile, INTEGER, PRODUCT, ASSEMBLY)
            low_acc = low_acc * shrink + tl.dot(probabilities, low_tile, input_precision="ieee")
            high_acc = high_acc * shrink + tl.dot(probabilities, high_tile, input_precision="ieee")
        else:
            probabilities = probabilities.to(ROUNDED).to(PRODUCT)
            low_acc = tl.dot(probabilities, tile.to(PRODUCT), low_acc * shrink, input_precision="ieee")

    total = tl.sum(sums, 1)
    divisor = tl.where(total > 0, total, 1.0)  # a query without a key gives zeros
    if QUANTISED:
        acc = tl.reshape(tl.join(low_acc, high_acc), [BLOCK_ROWS, BLOCK_DIM]) / divisor[:, None]
    else:
        acc = low_acc / divisor[:, None]
    dim = tl.arange(0, BLOCK_DIM)
    stored = real[:, None] & (dim < HEAD_DIM)[None, :]
    if SPLIT:  # noqa: SIM102, for the compiler decides this one
        if live > 1:
            rows = ((row * tl.num_programs(0) + head) * splits + part) * (TOKENS * SHARE) + index
            tl.store(mixed + rows[:, None] * HEAD_DIM + dim[None, :], acc, mask=stored)
            tl.store(weights + rows, tl.where(total > 0, top + tl.log2(divisor), float("-inf")), mask=real)
            return
    out_at = row * out_row + token * out_token + query_head * out_head
    tl.store(out + out_at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["window", "splits", "least_tiles"])
def _combine_parts(
    mixed, weights, lengths, out,
    out_row, out_token, out_head,
    window, splits, least_tiles,
    TOKENS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """One query head of one token: its parts, each weighed by the sum of exponentials that it stands for."""
    row = tl.program_id(1).to(tl.int64)
    _lowest, _first, _share, live = _row_parts(
        tl.load(lengths + row), window, splits, least_tiles, TOKENS, BLOCK_KEYS, WINDOWED
    )
    if live <= 1:  # written by its only part
        return
    kv_heads = tl.num_programs(0) // (TOKENS * SHARE)
    head = tl.program_id(0) // (TOKENS * SHARE)
    index = tl.program_id(0) % (TOKENS * SHARE)
    dim = tl.arange(0, BLOCK_DIM)
    from_part = (row * kv_heads + head) * splits
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    for start in tl.range(0, live, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        rows = (from_part + part) * (TOKENS * SHARE) + index
        weight = tl.load(weights + rows, mask=part < live, other=float("-inf"))
        real = (part < live)[:, None] & (dim < HEAD_DIM)[None, :]
        some = tl.load(mixed + rows[:, None] * HEAD_DIM + dim[None, :], mask=real, other=0.0)
        above = tl.maximum(top, tl.max(weight, 0))
        level = tl.where(above == float("-inf"), 0.0, above)
        shrink = tl.exp2(top - level)
        weight = tl.exp2(weight - level)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * some, 0)
        top = above
    acc = acc / tl.where(total > 0, total, 1.0)
    at = row * out_row + index // SHARE * out_token + (head * SHARE + index % SHARE) * out_head
    tl.store(out + at + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
