"""Prefill attention over pages on the GPU against the token-by-token reference, with NaN in all that nobody wrote."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from kernels.gpu.prefill_attention import (
    PrefillConfig,
    PrefillPlan,
    choose_splits,
    default_config,
    plan_prefill,
    prefill_attention,
    prefill_attention_reference,
    tile_tokens,
)
from tests.kernels_gpu.casts import use_exact_casts
from tests.kernels_gpu.conftest import COMPILED
from tests.kernels_gpu.pairwise import pairwise

SCALE = 0.15
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SMALL = PrefillConfig(block_m=32, block_n=32, num_warps=4)
RAGGED = ((0, 17), (31, 20), (16, 16), (47, 1), (5, 0), (3, 30))  # (start, tokens) of each row


class Batch(NamedTuple):
    q: torch.Tensor
    frames: torch.Tensor
    pages: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor | None
    host_starts: list[int]
    host_offsets: list[int]

    def plan(self, config: PrefillConfig) -> PrefillPlan:
        per_tile = tile_tokens(config, self.q.shape[1], self.frames.shape[1])
        return plan_prefill(self.host_starts, self.host_offsets, per_tile, self.q.device)

    def expected(self, window: int | None = None) -> torch.Tensor:
        lists = (self.pages, self.starts, self.offsets)
        return prefill_attention_reference(self.q, self.frames, 1, *lists, SCALE, window, self.scales)

    def got(self, window: int | None = None, **options: Any) -> torch.Tensor:
        lists = (self.pages, self.starts, self.offsets)
        return prefill_attention(self.q, self.frames, 1, *lists, SCALE, window, kv_scales=self.scales, **options)


@pytest.fixture(autouse=True)
def _rounds_as_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMPILED:
        use_exact_casts(monkeypatch)


def batch(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = RAGGED,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Batch:
    """Rows on pages of their own in random order. The last frame is poison: table entries that mean nothing name it."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(start + tokens) // page) for start, tokens in shapes]
    total = sum(counts) + 1
    free = torch.randperm(total - 1, generator=generator).tolist()
    pages = torch.full((len(shapes), max(counts) + 2), total - 1, dtype=torch.int32)
    written = torch.zeros(total, page, dtype=torch.bool)
    for row, ((start, tokens), count) in enumerate(zip(shapes, counts, strict=True)):
        own, free = free[:count], free[count:]
        first = 0 if window is None else max(0, start - window + 1)
        pages[row, first // page : count] = torch.tensor(own[first // page :], dtype=torch.int32)
        for position in range(first, start + tokens):
            written[own[position // page], position % page] = True
    hidden = ~written[:, None, None, None, :]
    wide = torch.randn(total, heads[1], 2, 2, page, head_dim, generator=generator)
    scales = None
    if stored is None:
        frames = wide.masked_fill(hidden[..., None], float("nan")).to(dtype)
    else:
        scales = wide.abs().amax(-1) / (100 if stored == torch.int8 else 300)
        frames = (wide / scales[..., None]).round() if stored == torch.int8 else wide / scales[..., None]
        frames = frames.to(stored)
        scales = scales.masked_fill(hidden, float("nan"))
    offsets = torch.tensor([0, *(tokens for _, tokens in shapes)]).cumsum(0)
    fused = torch.randn(int(offsets[-1]), heads[0] + 2, head_dim, generator=generator).to(dtype)
    return Batch(
        fused.to(device)[:, : heads[0]],  # queries lie beside keys and values, as a projection leaves them
        frames.to(device),
        pages.to(device),
        torch.tensor([start for start, _ in shapes], dtype=torch.int32, device=device),
        offsets.to(device, torch.int32),
        None if scales is None else scales.to(device),
        [start for start, _ in shapes],
        offsets.tolist(),
    )


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=TOLERANCE[got.dtype])


CASES = pairwise(
    {
        "types": [
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.float16, None),
            (torch.bfloat16, torch.float8_e4m3fn),
            (torch.float16, torch.int8),
        ],
        "heads": [(2, 2), (8, 2), (7, 1), (16, 1), (6, 2)],
        "head_dim": [64, 80, 128, 256],
        "page": [16, 32, 48],
        "window": [None, 1, 21, 40],
        "rows": [1, 3, 5],
        "planned": [True, False],
        "descriptors": [True, False],
        "splits": [None, 3],
    }
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_reference(case: dict[str, Any], device: torch.device) -> None:
    rng = random.Random(str(case))
    shapes = [(rng.choice([0, 1, 15, 16, 31, 33, 64]), rng.choice([1, 2, 15, 16, 17, 24])) for _ in range(case["rows"])]
    dtype, stored = case["types"]
    data = batch(device, shapes, case["heads"], case["head_dim"], case["page"], dtype, stored, case["window"], seed=3)
    block_m = 64 if case["heads"] == (16, 1) else 32
    config = PrefillConfig(block_m, 16 if case["page"] == 16 else 32, 4, descriptors=case["descriptors"])
    out = torch.full((*data.q.shape[:2], case["head_dim"] + 8), float("nan"), dtype=dtype, device=device)
    plan = data.plan(config) if case["planned"] else None
    options = {"plan": plan, "config": config, "splits": case["splits"], "out": out[..., : case["head_dim"]]}
    got = data.got(case["window"], max_tokens=max(tokens for _, tokens in shapes), **options)
    near(got, data.expected(case["window"]))
    assert bool(out[..., case["head_dim"] :].isnan().all()), "something was stored beside the result"


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.int8)], ids=str
)
def test_the_library_gives_the_same(
    dtype: torch.dtype, stored: torch.dtype | None, window: int | None, device: torch.device
) -> None:
    data = batch(device, dtype=dtype, stored=stored, window=window)
    near(data.got(window, plan=data.plan(SMALL), backend="library"), data.expected(window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_default_tiles(dtype: torch.dtype, device: torch.device) -> None:
    """Whole tiles, masked ones and the edge of a window, in the sizes that a GPU runs."""
    for window in (None, 150):
        data = batch(device, [(140, 150), (0, 3)], (2, 1), 64, dtype=dtype, window=window)
        near(data.got(window, plan=data.plan(default_config(64, dtype))), data.expected(window))


def test_tiles_without_a_plan_cover_the_longest_row(device: torch.device) -> None:
    data = batch(device)
    with_plan = data.got(config=SMALL, plan=data.plan(SMALL))
    assert torch.equal(data.got(config=SMALL, max_tokens=30), with_plan)
    assert torch.equal(data.got(config=SMALL), with_plan)


def test_no_rows_and_no_tokens(device: torch.device) -> None:
    data = batch(device, [(5, 0), (0, 0)])
    for plan in (None, data.plan(SMALL)):
        assert data.got(config=SMALL, plan=plan).shape == (0, 4, 64)


def test_a_row_of_nan_does_not_touch_another(device: torch.device) -> None:
    data = batch(device, [(10, 20), (9, 20)])
    before = data.got(config=SMALL)
    data.frames[int(data.pages[0, 0])] = float("nan")
    after = data.got(config=SMALL)
    assert bool(after[:20].isnan().all()) and torch.equal(after[20:], before[20:])


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("order", [(0, 2, 1, 3, 4, 5), (2, 1, 0, 3, 4, 5), (0, 1, 2, 4, 3, 5)])
def test_pages_are_addressed_through_strides(order: tuple[int, ...], descriptors: bool, device: torch.device) -> None:
    """Frames whose dimensions lie in another order, and that are padded; with K and V in turn a page is not dense."""
    data = batch(device, page=32)
    sizes = [data.frames.shape[dim] for dim in order]
    sizes[0] += 1
    room = torch.full(sizes, float("nan"), device=device)
    strided = room.permute([order.index(dim) for dim in range(6)])[: len(data.frames), :, :2]
    strided.copy_(data.frames)
    config = PrefillConfig(32, 32, 4, descriptors=descriptors)
    assert torch.equal(data._replace(frames=strided).got(config=config), data.got(config=config))


def test_pages_far_away_need_64_bits(device: torch.device) -> None:
    """A page beyond 2^31 elements. The memory between is never touched."""
    data = batch(device, [(0, 20)], (2, 1), dtype=torch.float16)
    pages, width = len(data.frames), data.frames[0].numel()
    stride = 2**31 // (pages - 2)
    stride += -stride % 16
    room = torch.empty((pages - 1) * stride + width, dtype=torch.float16, device=device)
    far = room.as_strided(data.frames.shape, (stride, *data.frames.stride()[1:]))
    far.copy_(data.frames)
    assert int(data.pages[0, :2].max()) * stride >= 2**30, "the test would show nothing"
    assert torch.equal(data._replace(frames=far).got(config=SMALL), data.got(config=SMALL))


def test_a_plan_covers_each_token_once_and_starts_with_the_most_keys() -> None:
    starts, lengths = [100, 0, 7, 64], [1, 300, 0, 65]
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    plan = plan_prefill(starts, offsets, 32)
    assert sorted(map(tuple, plan.tiles.tolist())) == sorted(
        (row, tile) for row, tokens in enumerate(lengths) for tile in range(-(-tokens // 32))
    )
    keys = [starts[row] + min(32 * (tile + 1), lengths[row]) for row, tile in plan.tiles.tolist()]
    assert keys == sorted(keys, reverse=True)
    assert plan.tiles.dtype == torch.int32 and plan_prefill([], [0], 32).tiles.shape == (0, 2)


def test_a_context_is_split_only_where_tiles_leave_the_chip_idle() -> None:
    def splits(start: int, tokens: int, rows: int = 1) -> int:
        plan = plan_prefill([start] * rows, [row * tokens for row in range(rows + 1)], 32)
        return choose_splits(plan, 8, 132)

    assert splits(0, 8192) == 1, "a whole prompt fills the chip"
    assert splits(32768, 64) == 8, "2 tiles of 8 heads leave room for 8 parts"
    assert splits(32768, 16) == 16 and splits(32768, 64, rows=8) == 1
    assert splits(1100, 16) == 2 and splits(0, 100) == 1, "short contexts are not worth it"
    assert splits(0, 0) == 1


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    data = batch(device, [(0, 4)])
    wrong: list[dict[str, Any]] = [
        {"q": data.q.half()},
        {"q": data.q[..., ::2]},
        {"q": data.q[:, :3]},
        {"pages": data.pages.long()},
        {"starts": data.starts[:0]},
        {"offsets": data.offsets[:1]},
        {"frames": data.frames.to(torch.int8)},
        {"scales": torch.ones(data.frames.shape[:5], device=device)},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            data._replace(**change).got()
    options: list[dict[str, Any]] = [
        {"window": 0},
        {"splits": 0},
        {"backend": "library"},
        {"backend": "other"},
        {"plan": data.plan(PrefillConfig(block_m=16)), "config": SMALL},
        {"out": data.q.half()},
    ]
    for option in options:
        with pytest.raises(AssertionError):
            data.got(**option)


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu.prefill_attention import _prefill_kernel as kernel, default_config
import torch

def compiled(kv, windowed, described):
    config = default_config(128, torch.bfloat16)
    quantised = kv != "bf16"
    none = [] if quantised else ["key_scales", "value_scales"]
    none += [] if described else ["key_rows", "value_rows"]
    constants = dict.fromkeys(none) | dict(
        GROUP=4, D=128, DP=128, P=config.block_n, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLITS=1 + windowed,
        PLANNED=True, WINDOWED=windowed, QUANTISED=quantised, DESCRIPTORS=described, WARP_SPECIALIZE=False, WIDEN=False)
    types = dict.fromkeys(kernel.arg_names, "i32") | dict(
        q="*bf16", out="*bf16", sums="*fp32", peaks="*fp32", keys="*" + kv, values="*" + kv,
        key_scales="*fp32", value_scales="*fp32",
        pages="*i32", starts="*i32", offsets="*i32", tiles="*i32", page_stride="i64", score_scale="fp32")
    types |= dict.fromkeys(("key_rows", "value_rows"), f"tensordesc<{kv}[{config.block_n}, 128]>")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = ("q", "out", "keys", "values", "q_token", "q_head", "page_stride", "head_stride", "token_stride")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in made.asm["ptx"], "the products are not Hopper's"
    assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == described, "descriptors"
    assert made.metadata.shared <= 227 << 10, made.metadata.shared

compiled("bf16", True, True)
compiled("fp8e4nv", False, False)
"""


def test_it_compiles_for_hopper(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter takes, the compiler may refuse. That needs no GPU: the assembler comes with Triton."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
