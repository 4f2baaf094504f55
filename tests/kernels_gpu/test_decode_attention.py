"""Paged decode attention against the token-by-token reference, with poison wherever no token was written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.gpu.decode_attention import (
    E4M3_PAIRS,
    INT8_PAIRS,
    LONGEST_SPLIT_TOKENS,
    MAX_SPLITS,
    DecodeConfig,
    choose_splits,
    decode_attention,
    decode_attention_reference,
    default_config,
)
from tests.kernels_gpu.pairwise import pairwise

LAYERS = 2
LAYER = 1
SCALE = 0.25
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}  # values are at most about 4
QUANTISED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Batch:
    q: torch.Tensor
    frames: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    kv_scales: torch.Tensor | None
    window: int | None

    def attend(self, **options: Any) -> torch.Tensor:
        return decode_attention(
            self.q, self.frames, LAYER, self.pages, self.lengths, SCALE, self.window, self.kv_scales, **options
        )

    def expected(self) -> torch.Tensor:
        return decode_attention_reference(
            self.q, self.frames, LAYER, self.pages, self.lengths, SCALE, self.window, self.kv_scales
        )

    def row(self, row: int) -> Batch:
        one = slice(row, row + 1)
        return Batch(self.q[one], self.frames, self.pages[one], self.lengths[one], self.kv_scales, self.window)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN where the type has one."""
    if dtype == torch.int8:
        return torch.full(shape, -113, dtype=dtype, device=device)
    return torch.full(shape, float("nan"), device=device).to(dtype)


def batch(
    device: torch.device,
    lengths: list[int],
    tokens: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    window: int | None = None,
    padding: int = 0,  # elements between two frames
    seed: int = 0,
) -> Batch:
    """Rows on pages of their own in random order. Beyond its length and before its window a row has no pages."""
    stored = stored or dtype
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    frame = (kv_heads, LAYERS, 2, page_size, head_dim)
    elements = kv_heads * LAYERS * 2 * page_size * head_dim
    pool = poisoned((sum(counts) + 1, elements + padding), stored, device)
    frames = pool[:, :elements].unflatten(1, frame)
    scales = poisoned((len(frames), *frame[:4]), torch.float32, device) if stored in QUANTISED else None
    order = torch.randperm(len(frames), generator=generator).tolist()
    pages = torch.full((len(lengths), max([1, *counts])), -1 << 30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        lowest = 0 if window is None else max(0, length - tokens - window + 1)
        for number in range(lowest // page_size, counts[row]):
            pages[row, number] = page = order.pop()
            first = max(0, lowest - number * page_size)
            last = min(page_size, length - number * page_size)
            values = torch.randn(*frame[:3], last - first, head_dim, generator=generator)
            if scales is not None:
                largest = 127 if stored == torch.int8 else torch.finfo(stored).max
                scale = values.abs().amax(-1) / largest
                values = values / scale[..., None]
                values = values.round() if stored == torch.int8 else values
                scales[page, :, :, :, first:last] = scale.to(device)
            frames[page, :, :, :, first:last] = values.to(stored).to(device)
    q = torch.randn(len(lengths), tokens, heads, head_dim, generator=generator).to(dtype).to(device)
    counted = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Batch(q, frames, pages.to(device), counted, scales, window)


def check(made: Batch, **options: Any) -> torch.Tensor:
    got = made.attend(**options)
    assert got.shape == made.q.shape and got.dtype == made.q.dtype
    torch.testing.assert_close(got.float(), made.expected(), rtol=0, atol=TOLERANCE[made.q.dtype])
    return got


CASES = pairwise(
    {
        "lengths": [[1, 40], [16, 0, 17, 15], [64, 65], [33, 100]],
        "tokens": [1, 2, 5, 8],
        "share": [1, 2, 3, 4, 8, 16],
        "kv_heads": [1, 2],
        "head_dim": [64, 80, 96, 128, 192, 256],
        "page_size": [16, 32, 64],
        "types": [
            (torch.float32, None),
            (torch.float16, None),
            (torch.bfloat16, None),
            (torch.float32, torch.int8),
            (torch.float16, torch.float8_e4m3fn),
            (torch.bfloat16, torch.int8),
            (torch.bfloat16, torch.float8_e4m3fn),
        ],
        "window": [None, None, 1, 20],
        "splits": [None, 1, 2, 5],
        "block_keys": [32, 64, 128],
        "padding": [0, 8],
    }
)


@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_every_two_values_of_every_two_axes(device: torch.device, case: dict[str, Any]) -> None:
    lengths = [length and max(length, case["tokens"]) for length in case["lengths"]]
    dtype, stored = case["types"]
    made = batch(
        device,
        lengths,
        case["tokens"],
        case["share"] * case["kv_heads"],
        case["kv_heads"],
        case["head_dim"],
        case["page_size"],
        dtype,
        stored,
        case["window"],
        case["padding"],
    )
    check(made, config=DecodeConfig(block_keys=case["block_keys"], splits=case["splits"]), sm_count=4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_lengths_around_the_borders_of_pages_and_tiles(device: torch.device, length: int) -> None:
    made = batch(device, [length])
    check(made, splits=2, config=DecodeConfig(block_keys=32))


@pytest.mark.parametrize("tokens", range(1, 9))
def test_each_query_token_sees_keys_up_to_its_own(device: torch.device, tokens: int) -> None:
    """The shortest row that may be: its first query sees one key, and parts begin beyond some queries' keys."""
    check(batch(device, [tokens, 31 + tokens], tokens), config=DecodeConfig(block_keys=16, splits=3))


def test_an_inactive_row_is_zero_whatever_its_pages(device: torch.device) -> None:
    made = batch(device, [0, 20, 0], tokens=3, heads=6)
    for splits in (1, 4):
        got = check(made, splits=splits, out=torch.full_like(made.q, float("nan")))
        assert not got[[0, 2]].any()


def test_no_rows(device: torch.device) -> None:
    assert batch(device, []).attend().shape == (0, 1, 4, 64)


def test_a_window_needs_no_pages_before_it(device: torch.device) -> None:
    made = batch(device, [100, 9], tokens=2, window=7)
    assert (made.pages[0, :5] < 0).all()
    check(made, config=DecodeConfig(block_keys=64))


def test_it_writes_where_it_is_told_and_nowhere_else(device: torch.device) -> None:
    made = batch(device, [40, 70], tokens=2, head_dim=80)
    wide = torch.full((2, 2, 6, 88), 7.0, device=device)
    out = wide[:, :, 1:5, :80]
    assert check(made, splits=3, out=out) is out
    out.fill_(7.0)
    assert (wide == 7.0).all()


def test_queries_may_be_a_part_of_a_wider_tensor(device: torch.device) -> None:
    made = batch(device, [40, 70], tokens=2)
    wide = torch.full((2, 2, 8, 64), float("nan"), device=device)
    wide[:, :, :4] = made.q
    got = Batch(wide[:, :, :4], made.frames, made.pages, made.lengths, None, None).attend()
    torch.testing.assert_close(got, made.attend(), rtol=0, atol=0)


def test_heads_or_layers_may_be_the_outer_dimension_of_a_frame(device: torch.device) -> None:
    made = batch(device, [40, 70], kv_heads=2)
    for order in ((2, 1, 0, 3, 4, 5), (1, 0, 3, 2, 4, 5), (0, 1, 2, 4, 3, 5)):
        back = [order.index(dim) for dim in range(6)]
        frames = made.frames.permute(order).contiguous().permute(back)
        check(Batch(made.q, frames, made.pages, made.lengths, None, None))


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device, stored: torch.dtype | None) -> None:
    """Bit by bit, while the number of splits stays."""
    made = batch(device, [130, 3, 0, 64], tokens=2, dtype=torch.float16, stored=stored)
    together = made.attend(splits=3)
    alone = torch.cat([made.row(row).attend(splits=3) for row in range(4)])
    assert torch.equal(together, alone)


def test_offsets_of_more_than_32_bits(device: torch.device, tmp_path: Path) -> None:
    """Pages beyond 2^32 elements of a pool; without a GPU, a file with nothing before those pages."""
    made = batch(device, [40, 17], dtype=torch.float16)
    frame = made.frames[0].numel()
    count = (1 << 32) // frame + len(made.frames)
    if device.type == "cuda":
        flat = torch.empty(count * frame, dtype=torch.float16, device=device)
    else:
        flat = torch.from_file(str(tmp_path / "pool"), shared=True, size=count * frame, dtype=torch.float16)
    pool = flat.view(count, *made.frames.shape[1:])
    pool[-len(made.frames) :] = made.frames
    moved = made.pages + (count - len(made.frames))
    assert torch.equal(Batch(made.q, pool, moved, made.lengths, None, None).attend(), made.attend())


@pytest.mark.parametrize("stored", QUANTISED, ids=str)
def test_scales_of_any_size(device: torch.device, stored: torch.dtype) -> None:
    """Keys with a scale of 0, values of next to nothing and huge ones side by side: no overflow in 16 bits."""
    made = batch(device, [50, 33], tokens=2, dtype=torch.bfloat16, stored=stored)
    scales = made.kv_scales
    assert scales is not None
    scales[:, :, :, 1, ::3] *= 1e-12
    scales[:, :, :, 1, 1::5] *= 1e9
    scales[:, :, :, :, 7] = 0
    scales[:, :, :, 1, 11] = 0
    got, expected = made.attend(splits=2).float(), made.expected()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    scales[:, :, :, 1] = 0
    assert not made.attend(splits=2).any()


@pytest.mark.parametrize(("stored", "bound"), [(torch.int8, 0.05), (torch.float8_e4m3fn, 0.3)], ids=str)
def test_quantised_keys_and_values_stay_near_the_exact_ones(
    device: torch.device, stored: torch.dtype, bound: float
) -> None:
    exact = batch(device, [70, 30], head_dim=128)
    kept = batch(device, [70, 30], head_dim=128, stored=stored)
    difference = (kept.attend() - exact.expected()).abs().max().item()
    assert 0 < difference < bound


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    made = batch(device, [60, 20])
    loud = Batch(made.q * 3e3, made.frames, made.pages, made.lengths, None, None)
    torch.testing.assert_close(loud.attend(splits=2), loud.expected(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sm_count", [1, 108, 132])
def test_splits_fill_the_chip_and_no_more(sm_count: int) -> None:
    for blocks in (1, 2, 8, 24, 64, 131, 256, 512, 4096):
        for bound in (1, 64, 512, 4096, 8192, 131072):
            plan = choose_splits(blocks, bound, sm_count, 64)
            assert 1 <= plan.splits <= MAX_SPLITS
            enough = blocks * plan.splits >= 2 * sm_count
            shortest = plan.splits * plan.least_tiles * 64 >= bound
            assert enough or shortest or plan.splits == MAX_SPLITS
            if blocks >= 2 * sm_count:
                assert (plan.splits == 1) == (bound <= LONGEST_SPLIT_TOKENS)


def test_tiles_of_the_default_leave_room_for_two_programs_on_a_multiprocessor() -> None:
    for head_dim in (64, 80, 96, 128, 192, 256):
        for size in (1, 2, 4):
            config = default_config(head_dim, size, 4)
            room = 2 * config.block_keys * (1 << (head_dim - 1).bit_length()) * size * config.num_stages
            assert room <= 114 << 10 and config.block_keys >= 16


@pytest.mark.parametrize(
    "change",
    [
        {"pages": torch.zeros(2, 3, dtype=torch.int64)},
        {"lengths": torch.zeros(3, dtype=torch.int32)},
        {"q": torch.zeros(2, 9, 4, 64)},
        {"q": torch.zeros(2, 1, 3, 64)},
        {"q": torch.zeros(2, 1, 4, 64, dtype=torch.float16)},
        {"q": torch.zeros(2, 1, 4, 128)[..., ::2]},
        {"frames": torch.zeros(5, 2, 2, 2, 16, 72)},
        {"kv_scales": torch.zeros(5, 2, 2, 2, 16)},
        {"window": 0},
    ],
    ids=str,
)
def test_wrong_inputs_are_refused(change: dict[str, Any]) -> None:
    made = batch(torch.device("cpu"), [40, 17])
    fields = {name: change.get(name, getattr(made, name)) for name in Batch.__slots__}
    with pytest.raises(AssertionError):
        Batch(**fields).attend()


def run_ptx(program: str, words: np.ndarray[Any, np.dtype[np.uint32]]) -> dict[str, Any]:
    """The few instructions that widen two words at a time, each on all of `words`; a register of pairs is [n, 2]."""
    pairs: dict[str, Any] = {"$2": words, "0": np.zeros_like(words)}
    for line in program.replace(";", "").split("\n"):
        name, _, rest = line.strip().partition(" ")
        into, *given = [part.strip() for part in rest.split(",")]
        if name == "mov.b32" and into.startswith("{"):
            source = pairs[given[-1]]
            pairs[into[1:]], pairs[given[0][:-1]] = source & 0xFFFF, source >> 16
        elif name == "mov.b32":
            pairs[into] = np.full_like(words, int(given[0], 16))
        elif name == "xor.b32":
            pairs[into] = pairs[given[0]] ^ np.uint32(int(given[1], 16))
        elif name == "prmt.b32":
            second = pairs[given[1]] if given[1] in pairs else np.full_like(words, int(given[1], 16))
            source = np.stack([pairs[given[0]], second], axis=1).view(np.uint8)  # bytes 0 to 3, then 4 to 7
            chosen = [int(given[2], 16) >> 4 * i & 7 for i in range(4)]
            pairs[into] = np.ascontiguousarray(source[:, chosen]).view(np.uint32)[:, 0]
        elif name == "sub.f16x2":
            one, other = (pairs[name].view(np.float16).reshape(-1, 2) for name in given)
            pairs[into] = one - other
        elif name == "cvt.rn.f16x2.e4m3x2":
            low = torch.from_numpy(pairs[given[0]].astype(np.uint16).view(np.uint8)).view(torch.float8_e4m3fn)
            pairs[into] = low.to(torch.float16).view(-1, 2).numpy()
        else:
            assert line.strip() in ("", "{", "}") or name == ".reg", line
    return pairs


@pytest.mark.parametrize("stored", QUANTISED, ids=str)
def test_the_assembly_widens_every_byte(stored: torch.dtype) -> None:
    """No interpreter runs it; here its instructions run one by one, on every byte in each of the four places."""
    one = np.arange(256, dtype=np.uint8)
    elements = np.stack([one, np.roll(one, 1), np.roll(one, 77), one[::-1]], axis=1)  # a0 a1 b0 b1
    words = np.ascontiguousarray(elements).view(np.uint32)[:, 0]
    made = run_ptx((INT8_PAIRS if stored == torch.int8 else E4M3_PAIRS).value, words)
    wide = torch.from_numpy(elements.copy()).view(stored).to(torch.float16).numpy()
    np.testing.assert_array_equal(made["$0"], wide[:, [0, 2]])
    np.testing.assert_array_equal(made["$1"], wide[:, [1, 3]])


COMPILE = """
import torch
from tests.kernels_gpu.hopper import compile_only
made = compile_only()
import kernels.gpu.decode_attention as decode
decode._has_conversion = lambda device: True

def step(stored, tokens=1, share=4, head_dim=128, rows=64, window=None):
    frames = torch.empty(4, 8, 2, 2, 16, head_dim, dtype=stored)
    scales = torch.empty(frames.shape[:5]) if stored.itemsize == 1 else None
    q = torch.empty(rows, tokens, 8 * share, head_dim, dtype=torch.bfloat16 if stored.itemsize == 1 else stored)
    pages, lengths = torch.empty(rows, 256, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    decode.decode_attention(q, frames, 1, pages, lengths, 0.1, window, scales, sm_count=132)
    kernel = made[-1] if made[-1].name == "_attend_part" else made[-2]
    assert not any(kernel.spills for kernel in made[-2:]), (kernel.registers, kernel.spilled_bytes)
    assert "cp.async.cg.shared.global" in kernel.ptx, "keys and values arrive 16 bytes at a time, on their own"
    assert kernel.programs >= (2 if tokens * share <= 64 else 1), (kernel.registers, kernel.shared_bytes)
    return kernel.ptx
"""


@pytest.mark.parametrize(
    "launches",
    [
        """
ptx = step(torch.bfloat16)
assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx
step(torch.bfloat16, tokens=4, head_dim=80, window=999, rows=4)
assert made[-1].name == "_combine_parts"
step(torch.float16, tokens=8, share=16)
step(torch.float32)
step(torch.float32, head_dim=256)
""",
        """
ptx = step(torch.float8_e4m3fn)
assert "cvt.rn.f16x2.e4m3x2" in ptx and "ld.shared.b8" not in ptx
ptx = step(torch.int8, head_dim=80)
assert "sub.f16x2" in ptx and "ld.shared.b8" not in ptx
step(torch.int8, head_dim=64)
step(torch.float8_e4m3fn, tokens=8, share=16, head_dim=256)
""",
    ],
    ids=["dense", "8 bits"],
)
def test_it_compiles_for_hopper(launches: str, tmp_path: Path) -> None:
    """Without a GPU: registers suffice, copies run on their own, and bytes are not transposed one by one."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE + launches],
        env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
