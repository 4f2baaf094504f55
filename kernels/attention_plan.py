"""Which rows of a batch attend together, which blocks of the pool they gather, and what is masked: once per step.

Every layer with the same window follows the same plan. Rows of one query token stand together in groups, padded to the
longest, as long as the padding and the gathered keys stay small; a longer row is a group of its own and is cut
into query blocks, so that the causal half of its scores is not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.page_address import Int64Array, block_rows

GROUP_BYTES = 4 << 20  # of gathered keys: beyond it they no longer wait in the cache for their product
PADDING_SHARE = 0.25  # of a group's gathered pages, at most, may be padding
SCORE_ROWS = 128  # query heads times tokens of one block: large enough for the matrix product, small enough for cache


class Span(NamedTuple):
    """Consecutive query tokens of one row, their keys already written: positions start .. start + length - 1."""

    pages: Sequence[int]
    start: int
    length: int


class Block(NamedTuple):
    """Queries [first, last) of each row of the group against the gathered keys [low, high)."""

    first: int
    last: int
    low: int
    high: int
    mask_from: int  # key column, from `low`, at which `mask` begins
    mask: torch.Tensor | None  # [g, 1, 1, last - first, high - low - mask_from] bool, True: not attended


class Group(NamedTuple):
    """`rows` rows of `length` query tokens each, from `first_token` of the batch; `slots` gathered keys per row."""

    first_token: int
    rows: int
    length: int
    slots: int
    gather: torch.Tensor  # [g * K * n] int64: block rows at layer 0, part K
    unwritten: torch.Tensor | None  # [z] int64: rows of the gathered [g * K * slots, D] that no token was written to
    blocks: tuple[Block, ...]


def plan_attention(
    spans: Sequence[Span], frames: torch.Tensor, query_heads: int, window: int | None
) -> tuple[Group, ...]:
    """Groups in the order of the spans; consecutive spans of one token are grouped."""
    kv_heads, page_size = frames.shape[1], frames.shape[4]
    page_bytes = kv_heads * page_size * frames.shape[5] * frames.element_size()
    block_tokens = max(16, SCORE_ROWS * kv_heads // query_heads)
    groups, token = [], 0
    for members in _together(spans, page_size, window, max(1, GROUP_BYTES // page_bytes)):
        groups.append(_group(members, token, frames, block_tokens, window))
        token += sum(span.length for span in members)
    return tuple(groups)


def _first_page(span: Span, page_size: int, window: int | None) -> int:
    return 0 if window is None else max(0, span.start - window + 1) // page_size


def _page_count(span: Span, page_size: int, window: int | None) -> int:
    return -(-(span.start + span.length) // page_size) - _first_page(span, page_size, window)


def _together(spans: Sequence[Span], page_size: int, window: int | None, limit_pages: int) -> Iterator[list[Span]]:
    members: list[Span] = []
    longest = used = 0
    for span in spans:
        count = _page_count(span, page_size, window)
        padded = max(longest, count) * (len(members) + 1)
        fits = padded <= limit_pages and padded - used - count <= PADDING_SHARE * padded
        if members and not (span.length == members[0].length == 1 and fits):
            yield members
            members, longest, used = [], 0, 0
        members.append(span)
        longest, used = max(longest, count), used + count
    if members:
        yield members


def _group(members: list[Span], token: int, frames: torch.Tensor, block_tokens: int, window: int | None) -> Group:
    kv_heads, page_size = frames.shape[1], frames.shape[4]
    firsts = [_first_page(span, page_size, window) for span in members]
    width = max(_page_count(span, page_size, window) for span in members)
    pages = np.empty((len(members), width), dtype=np.int64)
    for row, (span, first) in enumerate(zip(members, firsts, strict=True)):
        own = span.pages[first : first + _page_count(span, page_size, window)]
        pages[row, : len(own)] = own
        pages[row, len(own) :] = own[-1]  # any frame of the pool would do: what it holds is masked
    origin = np.array(firsts, dtype=np.int64) * page_size
    start = np.array([span.start for span in members], dtype=np.int64)
    length, slots = members[0].length, width * page_size
    return Group(
        first_token=token,
        rows=len(members),
        length=length,
        slots=slots,
        gather=torch.from_numpy(block_rows(frames, pages).reshape(-1)),
        unwritten=_unwritten(start + length - origin, kv_heads, slots),
        blocks=tuple(_blocks(start - origin, length, slots, block_tokens, window)),
    )


def _unwritten(lengths: Int64Array, kv_heads: int, slots: int) -> torch.Tensor | None:
    """Rows past each sequence's end, which may hold anything: a probability of 0 times NaN would be NaN."""
    row, slot = np.nonzero(np.arange(slots) >= lengths[:, None])
    if not row.size:
        return None
    heads = (row[:, None] * kv_heads + np.arange(kv_heads)) * slots
    return torch.from_numpy((heads + slot[:, None]).reshape(-1))


def _blocks(start: Int64Array, length: int, slots: int, block_tokens: int, window: int | None) -> Iterator[Block]:
    """`start` [g]: the gathered slot of each row's first query."""
    for first in range(0, length, block_tokens):
        last = min(first + block_tokens, length)
        high = slots if last == length else int(start[0]) + last
        low = 0 if window is None or len(start) > 1 else max(0, int(start[0]) + first - window + 1)
        mask_from = 0 if window is not None else int(start.min()) + first + 1 - low
        query = start[:, None, None] + np.arange(first, last)[:, None]  # [g, m, 1]
        key = np.arange(low + mask_from, high)
        masked = key > query
        if window is not None:
            masked |= key <= query - window
        mask = torch.from_numpy(masked[:, None, None]) if masked.any() else None
        yield Block(first, last, low, high, mask_from, mask)
