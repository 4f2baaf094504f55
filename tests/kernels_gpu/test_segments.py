"""Gather, scatter and copy of page segments: bit by bit what indexing does, and no byte beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gpu.segments import (
    copy_pages,
    copy_pages_between,
    copy_pages_between_reference,
    copy_pages_reference,
    gather_segments,
    gather_segments_reference,
    scatter_segments,
    scatter_segments_reference,
)
from tests.kernels_gpu.pairwise import pairwise
from tests.kernels_gpu.pools import KINDS, all_bytes, pool

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
CASES = pairwise(
    {
        "dtype": DTYPES,
        "kind": KINDS,
        "inner": [(1, 16, 1), (2, 16, 8), (1, 16, 3), (3, 5, 40), (2, 16, 128)],  # L, P, D
        "heads": [(1, 0, 1), (4, 0, 4), (4, 1, 3), (3, 2, 3)],  # K, low, high
        "pages": [[], [3], [5, 0, 2]],
        "index": [torch.int32, torch.int64],
    }
)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)


def frames_of(case: dict[str, Any], device: torch.device) -> torch.Tensor:
    layers, slots, dim = case["inner"]
    torch.manual_seed(dim)
    return pool(case["kind"], (6, case["heads"][0], layers, 2, slots, dim), case["dtype"], device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_and_scatter(case: dict[str, Any], device: torch.device) -> None:
    frames, (_, low, high) = frames_of(case, device), case["heads"]
    pages = torch.tensor(case["pages"], dtype=case["index"], device=device)
    before = all_bytes(frames)
    staging = gather_segments(frames, pages, low, high)
    assert torch.equal(
        bits(staging), bits(gather_segments_reference(frames.view(dtype_of_bits(frames)), pages, low, high))
    )
    assert torch.equal(all_bytes(frames), before)
    fresh = torch.randint_like(bits(staging), 256).view(staging.dtype).view(staging.shape)
    scatter_segments(fresh, frames, pages, low, high)
    got = all_bytes(frames)
    frames.untyped_storage().copy_(before.untyped_storage())
    as_bits = frames.view(dtype_of_bits(frames))
    scatter_segments_reference(fresh.view(dtype_of_bits(frames)), as_bits, pages, low, high)
    assert torch.equal(got, all_bytes(frames))


def dtype_of_bits(frames: torch.Tensor) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16, 1: torch.uint8}[frames.element_size()]


@pytest.mark.parametrize("case", pairwise({"dtype": DTYPES, "kind": KINDS, "inner": [(2, 16, 8), (1, 16, 3)]}), ids=str)
def test_copy(case: dict[str, Any], device: torch.device) -> None:
    frames = frames_of(case | {"heads": (3, 0, 3)}, device)
    before = all_bytes(frames)
    sources, targets = torch.tensor([4, 1, 4], device=device), torch.tensor([0, 5, 2], device=device)
    copy_pages(frames, sources, targets)
    got = all_bytes(frames)
    frames.untyped_storage().copy_(before.untyped_storage())
    copy_pages_reference(frames.view(dtype_of_bits(frames)), sources, targets)
    assert torch.equal(got, all_bytes(frames)) and not torch.equal(got, before)


@pytest.mark.parametrize("case", pairwise({"dtype": DTYPES, "kind": KINDS, "inner": [(2, 16, 8), (1, 16, 3)]}), ids=str)
def test_copy_from_one_pool_to_another(case: dict[str, Any], device: torch.device) -> None:
    """The other pool is dense, of another size; the same copy may be asked for twice."""
    frames = frames_of(case | {"heads": (3, 0, 3)}, device)
    layers, slots, dim = case["inner"]
    target = pool("dense", (4, 3, layers, 2, slots, dim), case["dtype"], device)
    source_before, expected = all_bytes(frames), target.clone()
    sources, targets = torch.tensor([5, 2, 5], device=device), torch.tensor([0, 3, 0], device=device)
    copy_pages_between(frames, sources, target, targets)
    as_bits = dtype_of_bits(frames)
    copy_pages_between_reference(frames.view(as_bits), sources, expected.view(as_bits), targets)
    assert torch.equal(bits(target), bits(expected)) and torch.equal(all_bytes(frames), source_before)
    with pytest.raises(AssertionError):
        copy_pages_between(frames[:, :2], sources, target, targets)


def test_enough_segments_for_large_blocks(device: torch.device) -> None:
    frames = pool("dense", (270, 1, 1, 2, 16, 2), torch.float32, device)
    pages = torch.randperm(270, device=device)
    assert torch.equal(bits(gather_segments(frames, pages, 0, 1)), bits(frames.view(torch.int32)[pages]))


def test_offsets_beyond_31_bits(device: torch.device) -> None:
    apart = 2**28
    memory = torch.empty(8 * apart + 4096, dtype=torch.int8, device=device)  # touched here and there only
    frames = memory.as_strided((9, 1, 2, 2, 16, 63), (apart, 0, 2048, 1024, 64, 1))  # 63: single bytes are the words
    frames[0], frames[8] = 1, 2
    staging = gather_segments(frames, torch.tensor([8, 0], device=device), 0, 1)
    assert bool((staging[0] == 2).all()) and bool((staging[1] == 1).all())
    copy_pages(frames, torch.tensor([8], device=device), torch.tensor([3], device=device))
    assert torch.equal(frames[3], frames[8])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    frames = torch.zeros(4, 2, 1, 2, 16, 8, device=device)
    pages = torch.tensor([1, 2], device=device)
    staging = torch.zeros(2, 2, 1, 2, 16, 8, device=device)
    for low, high in ((0, 3), (-1, 1), (1, 1)):
        with pytest.raises(AssertionError):
            gather_segments(frames, pages, low, high)
    wrong = (staging[:1], staging.half(), staging.flatten(4), torch.zeros(2, 2, 1, 2, 16, 9, device=device)[..., :8])
    for other in wrong:
        with pytest.raises(AssertionError):
            scatter_segments(other, frames, pages, 0, 2)
    with pytest.raises(AssertionError):
        gather_segments(frames, pages.float(), 0, 2)
    with pytest.raises(AssertionError):
        gather_segments(frames.transpose(4, 5), pages, 0, 2)
    with pytest.raises(AssertionError):
        copy_pages(frames, pages, pages[:1])
