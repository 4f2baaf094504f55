"""Moves page segments between the pool and dense staging memory, and copies pages within a pool.

    gather    frames [N, K, L, 2, P, D], pages [n], heads [low, high)   →  staging [n, high - low, L, 2, P, D], dense
    scatter   the way back
    copy      pages sources [n] → pages targets [n] of the same frames, or of another pool's, all heads

A segment is what one KV head has in one page: the bytes that a hand-off moves and digests as one. Bytes are moved as
they are, whatever the type: as words of 8 bytes, two per access, or narrower ones where strides are odd. Only D must be
dense in `frames`; where a segment is dense it is one run. pages are int32 or int64, on the device of the frames, each
of the pool; scatter and copy want targets that are neither named twice nor sources of the same call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.chip import multiprocessors

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
LARGE, SMALL = 2048, 512  # words per program: 16 KB in flight, less where large ones would not fill the chip
OUTER = 5  # dimensions of frames besides D


@triton.jit
def word_offset(word, layer, part, slot, WIDTH: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr):
    """Where a word of a segment lies, from the segment's start. `layer`, `part`, `slot` are strides, in words."""
    if DENSE:
        offset = word
    else:
        token = word // WIDTH
        block, at_slot = token // SLOTS, (token % SLOTS).to(tl.int64)
        offset = (block // 2).to(tl.int64) * layer + (block % 2).to(tl.int64) * part + at_slot * slot + word % WIDTH
    return offset


@triton.jit
def _move(
    source, source_pages, target, target_pages, heads, blocks,
    source_page, source_head, source_layer, source_part, source_slot,
    target_page, target_head, target_layer, target_part, target_slot,
    SEGMENT: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    SOURCE_LISTED: tl.constexpr, TARGET_LISTED: tl.constexpr, SOURCE_DENSE: tl.constexpr, TARGET_DENSE: tl.constexpr,
):  # fmt: skip
    """A block of words of one segment. The side that is not listed has its segments in the order of the list."""
    program = tl.program_id(0)
    segment = program // blocks
    entry, head = segment // heads, (segment % heads).to(tl.int64)
    word = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = word < SEGMENT
    come = tl.load(source_pages + entry).to(tl.int64) if SOURCE_LISTED else entry.to(tl.int64)
    go = tl.load(target_pages + entry).to(tl.int64) if TARGET_LISTED else entry.to(tl.int64)
    start = source + come * source_page + head * source_head
    end = target + go * target_page + head * target_head
    at = word_offset(word, source_layer, source_part, source_slot, WIDTH, SLOTS, SOURCE_DENSE)
    to = word_offset(word, target_layer, target_part, target_slot, WIDTH, SLOTS, TARGET_DENSE)
    tl.store(end + to, tl.load(start + at, mask=inside, eviction_policy="evict_first"), mask=inside)


def as_words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same memory in the widest words that all strides, starts and rows are multiples of."""
    item = tensors[0].element_size()
    for word in WORDS:
        ratio, rest = divmod(word.itemsize, item)
        if ratio == 0 or rest or any(t.data_ptr() % word.itemsize or t.shape[-1] % ratio for t in tensors):
            continue
        if not any(stride % ratio for t in tensors for stride in t.stride()[:-1]):
            return [t.view(word) for t in tensors]
    return [t.view({4: torch.int32, 2: torch.int16}.get(item, torch.uint8)) for t in tensors]


def dense_segment(frames: torch.Tensor) -> bool:
    """Whether [L, 2, P, D] of one page and head is one run of memory."""
    return frames[0, 0].is_contiguous()


def _check(frames: torch.Tensor, *lists: torch.Tensor) -> None:
    assert frames.dim() == 6 and frames.shape[3] == 2 and frames.stride(5) == 1, (frames.shape, frames.stride())
    for pages in lists:
        assert pages.dim() == 1 and pages.is_contiguous() and len(pages) == len(lists[0]), pages.shape
        assert pages.dtype in (torch.int32, torch.int64) and pages.device == frames.device, (pages.dtype, pages.device)


def _check_staging(frames: torch.Tensor, pages: torch.Tensor, low: int, high: int, staging: torch.Tensor) -> None:
    _check(frames, pages)
    assert 0 <= low < high <= frames.shape[1], (low, high, frames.shape)
    assert staging.shape == (len(pages), high - low, *frames.shape[2:]), (staging.shape, frames.shape, len(pages))
    assert staging.dtype == frames.dtype and staging.is_contiguous(), (staging.dtype, staging.stride())
    assert staging.device == frames.device, (staging.device, frames.device)


def _launch(
    source: torch.Tensor, source_pages: torch.Tensor | None, target: torch.Tensor, target_pages: torch.Tensor | None
) -> None:
    """Both [pages, heads, L, 2, P, D]; without a list a side's pages are taken in order."""
    pages = target_pages if source_pages is None else source_pages
    assert pages is not None, "one side is listed"
    heads = source.shape[1]
    if len(pages) == 0 or source[0, 0].numel() == 0:
        return
    words, goal = as_words(source, target)
    segment = words[0, 0].numel()
    large = len(pages) * heads * triton.cdiv(segment, LARGE) >= 2 * multiprocessors(source.device)
    block = min(LARGE if large else SMALL, triton.next_power_of_2(segment))
    blocks = triton.cdiv(segment, block)
    _move[(len(pages) * heads * blocks,)](
        words, pages if source_pages is None else source_pages, goal, pages if target_pages is None else target_pages,
        heads, blocks, *words.stride()[:OUTER], *goal.stride()[:OUTER],
        SEGMENT=segment, WIDTH=words.shape[5], SLOTS=words.shape[4], BLOCK=block,
        SOURCE_LISTED=source_pages is not None, TARGET_LISTED=target_pages is not None,
        SOURCE_DENSE=dense_segment(words), TARGET_DENSE=dense_segment(goal),
        num_warps=min(max(block // 256, 1), 8), enable_fp_fusion=False,
    )  # fmt: skip


def gather_segments(
    frames: torch.Tensor, pages: torch.Tensor, low: int, high: int, staging: torch.Tensor | None = None
) -> torch.Tensor:
    """[n, high - low, L, 2, P, D], dense; a new one unless `staging` is given."""
    if staging is None:
        staging = frames.new_empty((len(pages), high - low, *frames.shape[2:]))
    _check_staging(frames, pages, low, high, staging)
    _launch(frames[:, low:high], pages, staging, None)
    return staging


def scatter_segments(staging: torch.Tensor, frames: torch.Tensor, pages: torch.Tensor, low: int, high: int) -> None:
    """staging [n, high - low, L, 2, P, D] into its pages; what lies beside the segments stays."""
    _check_staging(frames, pages, low, high, staging)
    _launch(staging, None, frames[:, low:high], pages)


def copy_pages(frames: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Each source page over its target: what copy-on-write does to a page that is about to differ."""
    _check(frames, sources, targets)
    _launch(frames, sources, frames, targets)


def copy_pages_between(
    source: torch.Tensor, sources: torch.Tensor, target: torch.Tensor, targets: torch.Tensor
) -> None:
    """Pages of one pool over those of another, [N, ...] and [M, ...]: what a hand-off on one host does.

    `source` may lie in memory of another GPU that ours reaches. A target may be named twice with the same source.
    """
    assert source.dim() == 6 and source.stride(5) == 1, (source.shape, source.stride())
    _check(target, sources, targets)
    assert source.shape[1:] == target.shape[1:] and source.dtype == target.dtype, (source.shape, target.shape)
    _launch(source, sources, target, targets)


def gather_segments_reference(frames: torch.Tensor, pages: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return frames[pages.long(), low:high].contiguous()


def scatter_segments_reference(
    staging: torch.Tensor, frames: torch.Tensor, pages: torch.Tensor, low: int, high: int
) -> None:
    frames[pages.long(), low:high] = staging


def copy_pages_between_reference(
    source: torch.Tensor, sources: torch.Tensor, target: torch.Tensor, targets: torch.Tensor
) -> None:
    target[targets.long()] = source[sources.long()]


def copy_pages_reference(frames: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    frames[targets.long()] = frames[sources.long()]
