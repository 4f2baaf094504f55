"""Attention and writing over pages against the token-by-token references, with NaN in every slot that nobody wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention_plan import GROUP_BYTES, PADDING_SHARE, Span, plan_attention
from kernels.page_address import flat, vector_rows
from kernels.page_write import page_write, page_write_reference, write_rows
from kernels.paged_attention import GatherBuffer, paged_attention, paged_attention_reference

PAGE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def pool(pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, layers: int = 2) -> torch.Tensor:
    return torch.full((pages, kv_heads, layers, 2, PAGE, head_dim), float("nan"), dtype=dtype)


def spans_over(frames: torch.Tensor, shapes: list[tuple[int, int]], seed: int = 0) -> list[Span]:
    """(start, length) each, on pages of their own in random order, with random keys and values written."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(len(frames), generator=generator).tolist()
    spans = []
    for start, length in shapes:
        count = -(-(start + length) // PAGE)
        pages, free = free[:count], free[count:]
        spans.append(Span(pages, start, length))
        for position in range(start + length):
            slot = frames[pages[position // PAGE], :, :, :, position % PAGE]
            slot.copy_(torch.randn(slot.shape, generator=generator))
    return spans


def check(
    shapes: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> None:
    pages = sum(-(-(start + length) // PAGE) for start, length in shapes)
    frames = pool(pages + 1, kv_heads, head_dim, dtype)
    spans = spans_over(frames, shapes)
    q = torch.randn(sum(length for _, length in shapes), heads, head_dim).to(dtype)
    groups = plan_attention(spans, frames, heads, window)
    got = paged_attention(q, frames, 1, groups, 0.3, GatherBuffer())
    expected = paged_attention_reference(q, frames, 1, spans, 0.3, window)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
def test_decode_rows_chunks_and_first_chunks(dtype: torch.dtype, window: int | None, heads: int, kv_heads: int) -> None:
    check([(63, 1), (50, 1), (0, 1), (0, 17), (31, 40), (16, 16), (5, 2)], heads, kv_heads, 32, dtype, window)


@pytest.mark.parametrize("window", [None, 30, 100])
def test_a_long_chunk_is_cut_into_blocks(window: int | None) -> None:
    check([(33, 300)], 4, 1, 16, window=window)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 2, 15, 16, 17, 50])), min_size=1, max_size=7),
    window=st.one_of(st.none(), st.integers(1, 90)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
)
def test_any_batch_equals_the_reference(
    shapes: list[tuple[int, int]], window: int | None, heads: tuple[int, int]
) -> None:
    check(shapes, *heads, 8, window=window)


def test_groups_stay_small_and_dense() -> None:
    frames = pool(1, 8, 128, torch.bfloat16)
    starts = sorted([2000, 1990, 600, 590, 580, 300, 290, 31, 17, 16, 3, 0], reverse=True)
    spans = [Span([0] * (start // PAGE + 1), start, 1) for start in starts]
    groups = plan_attention(spans, frames, 16, None)
    assert sum(group.rows for group in groups) == len(spans)
    first = 0
    for group in groups:
        members = spans[first : first + group.rows]
        first += group.rows
        used = sum(len(span.pages) for span in members) * PAGE
        assert group.rows == 1 or group.rows * group.slots * (1 - PADDING_SHARE) <= used
        assert group.rows == 1 or group.rows * group.slots * 8 * 128 * 2 <= GROUP_BYTES
    assert len(groups) < len(spans)


def test_a_row_of_nan_does_not_touch_its_group() -> None:
    frames = pool(9, 2, 16, torch.float32)
    spans = spans_over(frames, [(40, 1), (39, 1)])
    q = torch.randn(2, 4, 16)
    groups = plan_attention(spans, frames, 4, None)
    assert len(groups) == 1
    before = paged_attention(q, frames, 0, groups, 1.0, GatherBuffer())
    frames[spans[0].pages[0]] = float("nan")
    after = paged_attention(q, frames, 0, groups, 1.0, GatherBuffer())
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (0, 2, 1, 3, 4, 5), (2, 1, 0, 3, 4, 5)])
def test_pages_are_addressed_through_strides(order: tuple[int, ...]) -> None:
    """Frames whose dimensions lie in another order, and that are padded, behave as dense ones."""
    shape = (7, 2, 3, 2, PAGE, 8)
    sizes = [shape[dim] for dim in order]
    sizes[0] += 1  # one more of the outermost than is used: padding
    backwards = [order.index(dim) for dim in range(6)]
    strided = torch.zeros(sizes).permute(backwards)[: shape[0], : shape[1], : shape[2]]
    dense = torch.zeros(shape)
    pages, slots = np.array([3, 3, 6, 0]), np.array([0, 15, 7, 1])
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    page_write(strided, 1, k, v, write_rows(strided, pages, slots))
    page_write_reference(dense, 1, k, v, pages, slots)
    assert torch.equal(strided, dense)
    spans, q = [Span([3], 0, 1)], torch.randn(1, 4, 8)
    results = [
        paged_attention(q, frames, 1, plan_attention(spans, frames, 4, None), 1.0, GatherBuffer())
        for frames in (strided, dense)
    ]
    assert torch.equal(*results)


def test_rows_of_a_large_pool_need_64_bits() -> None:
    frames = torch.empty(40000, 8, 64, 2, 64, 128, device="meta")
    rows = vector_rows(frames, np.array([39999]), np.array([63]))
    assert int(rows[0, 7]) == 40000 * 8 * 64 * 2 * 64 - 64 * 2 * 64 + 63 and rows.dtype == np.int64


def test_flat_refuses_a_frame_whose_vectors_are_not_dense() -> None:
    with pytest.raises(AssertionError):
        flat(torch.zeros(1, 1, 1, 2, PAGE, 8)[..., ::2], 4)
