"""The digest on the device against the library that hosts digest with: equal in every bit, for every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import xxhash

from core.layout import PageLayout
from kernels.gpu import segment_digest
from kernels.gpu.segment_digest import digest_constants, segment_digests, segment_digests_reference
from kvtransfer.digest import digest_page, plain
from tests.kernels_gpu.pairwise import pairwise
from tests.kernels_gpu.pools import pool

# Around the ends of stripes, blocks, and the loads ahead of them. In units of 16 bytes.
LENGTHS = [16, 17, 19, 20, 21, 60, 61, 63, 64, 65, 67, 68, 69, 127, 128, 129, 192, 1023, 1024, 1025, 1088, 1089, 2113]
CASES = pairwise(
    {
        "dtype": [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8],
        "kind": ["dense", "padded", "tokens first", "layers first"],
        "inner": [(1, 16, 8), (2, 16, 40), (3, 5, 24), (2, 32, 64)],  # L, P, D
        "heads": [(1, 0, 1), (4, 0, 4), (4, 1, 3)],  # K, low, high
        "pages": [[], [2], [5, 0, 2]],
        "index": [torch.int32, torch.int64],
    }
)


@pytest.mark.parametrize("units", LENGTHS)
def test_every_length(units: int, device: torch.device) -> None:
    frames = torch.randint(0, 256, (2, 1, 1, 2, units, 8), dtype=torch.uint8, device=device)
    pages = torch.tensor([1, 0], device=device)
    found = segment_digests(frames, pages, 0, 1, digest_constants(device))
    for digest, page in zip(found, (1, 0), strict=True):
        assert digest.cpu().numpy().tobytes() == xxhash.xxh3_64_digest(frames[page].cpu().numpy().tobytes())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pools(case: dict[str, Any], device: torch.device) -> None:
    (heads, low, high), (layers, slots, dim) = case["heads"], case["inner"]
    torch.manual_seed(dim)
    frames = pool(case["kind"], (6, heads, layers, 2, slots, dim), case["dtype"], device)
    pages = torch.tensor(case["pages"], dtype=case["index"], device=device)
    found = segment_digests(frames, pages, low, high, digest_constants(device))
    assert torch.equal(found, segment_digests_reference(frames, pages, low, high))


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_extreme_bytes_carry_as_they_should(byte: int, device: torch.device) -> None:
    frames = torch.full((1, 1, 2, 2, 16, 64), byte, dtype=torch.uint8, device=device)
    pages = torch.zeros(1, dtype=torch.int32, device=device)
    found = segment_digests(frames, pages, 0, 1, digest_constants(device))
    assert torch.equal(found, segment_digests_reference(frames, pages, 0, 1))


def test_a_page_digests_as_the_host_does_it(device: torch.device) -> None:
    layout = PageLayout(kv_heads=3, layers=2, page_size=16, head_dim=8, dtype="bfloat16")
    frames = torch.randn(4, 3, 2, 2, 16, 8).to(device, torch.bfloat16)
    pages = torch.tensor([3], device=device)
    found = segment_digests(frames, pages, 0, 3, digest_constants(device)).cpu().numpy().tobytes()
    buffer = memoryview(frames.cpu().view(torch.uint8).numpy()).cast("B")
    assert found == digest_page(buffer, layout, 3, plain().of)


def test_one_bit_changes_one_digest(device: torch.device) -> None:
    frames = torch.zeros(3, 2, 1, 2, 16, 64, dtype=torch.uint8, device=device)
    pages, constants = torch.arange(3, device=device), digest_constants(device)
    before = segment_digests(frames, pages, 0, 2, constants)
    frames[1, 1, 0, 1, 7, 30] = 4
    changed = (segment_digests(frames, pages, 0, 2, constants) != before).any(-1)
    assert changed.tolist() == [[False, False], [False, True], [False, False]]


def test_long_lists_go_in_turns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (7, 2, 1, 2, 16, 64), dtype=torch.uint8, device=device)
    pages, constants = torch.tensor([6, 2, 2, 0, 5, 1, 3], device=device), digest_constants(device)
    monkeypatch.setattr(segment_digest, "SCRATCH_BYTES", 3 * 2 * 2 * 64)  # three pages at a time
    out = torch.zeros(7, 2, 8, dtype=torch.uint8, device=device)
    assert segment_digests(frames, pages, 0, 2, constants, out) is out
    assert torch.equal(out, segment_digests_reference(frames, pages, 0, 2))
    monkeypatch.setattr(segment_digest, "SCRATCH_BYTES", 1)  # never less than one
    assert torch.equal(segment_digests(frames, pages, 0, 2, constants), out)


def test_segments_that_are_not_of_the_long_kind_are_refused(device: torch.device) -> None:
    pages, constants = torch.zeros(1, dtype=torch.int64, device=device), digest_constants(device)
    short = torch.zeros(1, 1, 1, 2, 15, 8, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="240 bytes"):
        segment_digests(short, pages, 0, 1, constants)
    narrow = torch.zeros(1, 1, 4, 2, 16, 4, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="words of 8"):
        segment_digests(narrow, pages, 0, 1, constants)
    with pytest.raises(AssertionError):
        segment_digests(short, pages, 0, 2, constants)
    with pytest.raises(AssertionError):
        segment_digests(short, pages.float(), 0, 1, constants)
    with pytest.raises(AssertionError):
        segment_digests(short, pages, 0, 1, constants[:40])
