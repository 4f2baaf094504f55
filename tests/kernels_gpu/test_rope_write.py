"""Rotation and page write in one pass: against the references and the CPU's kernels, in pools full of NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kernels.gpu.rope_write import LARGEST, rope_write, rope_write_reference
from kernels.page_write import page_write, write_rows
from kernels.rope import angles, inverse_frequencies, rope
from tests.kernels_gpu.pairwise import pairwise

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
CASES = pairwise(
    {
        "dtype": [F32, BF16, F16],
        "stored": [None, torch.float8_e4m3fn, torch.int8],
        "heads": [(1, 1), (4, 2), (7, 1), (6, 3), (20, 5)],
        "head_dim": [64, 80, 128, 256],
        "tokens": [0, 1, 9],
        "pool": ["dense", "padded", "tokens first"],
        "norm": [False, True],
    }
)


@dataclasses.dataclass
class Step:
    """The arguments of one call, on a pool that is NaN all over."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    inv_freq: torch.Tensor
    frames: torch.Tensor
    layer: int
    pages: torch.Tensor
    slots: torch.Tensor
    kv_scales: torch.Tensor | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    def copy(self) -> Step:
        """Every tensor with its strides and the memory between them."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return Step(*(whole_copy(field) if isinstance(field, torch.Tensor) else field for field in fields))

    def given(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def whole_copy(values: torch.Tensor) -> torch.Tensor:
    if values._base is None:
        return values.clone()
    return values._base.clone().as_strided(values.shape, values.stride(), values.storage_offset())


def pool(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """frames [N, K, L, 2, P, D], NaN where the type has one, over memory of another shape."""
    pages, heads, layers, parts, slots, dim = shape
    fill = 77 if dtype == torch.int8 else NAN
    if kind == "dense":
        memory = torch.empty(shape, device=device)
        frames = memory.fill_(fill).to(dtype)
        return frames.view(shape)
    if kind == "padded":
        frames = torch.full((pages, heads + 1, layers, parts, slots + 3, dim), fill, device=device).to(dtype)
        return frames[:, :heads, :, :, :slots]
    frames = torch.full((pages, slots, layers, parts, heads, dim), fill, device=device).to(dtype)
    return frames.permute(0, 4, 2, 3, 1, 5)


def step(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = F32,
    stored: torch.dtype | None = None,
    kind: str = "dense",
    norm: bool = False,
) -> Step:
    """Token 3 of more than three is padding."""
    (q_heads, kv_heads), n, layers, size = heads, 5 + tokens // 16, 3, 16
    torch.manual_seed(tokens + head_dim)
    fused = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim).to(device, dtype)
    places = torch.randperm(n * size)[:tokens]
    pages, slots = (places // size).int(), (places % size).int()
    if tokens > 3:
        pages[3] = -1
        fused[3] = NAN
    frames = pool((n, kv_heads, layers, 2, size, head_dim), kind, stored or dtype, device)
    return Step(
        *(fused[:, :q_heads], fused[:, q_heads : q_heads + kv_heads], fused[:, q_heads + kv_heads :]),
        positions=torch.randint(0, 3000, (tokens,), dtype=torch.int32 if tokens % 2 else torch.int64).to(device),
        inv_freq=inverse_frequencies(head_dim, 10000.0).to(device),
        frames=frames,
        layer=1,
        pages=pages.to(device),
        slots=slots.to(device),
        kv_scales=None if stored is None else torch.full(frames.shape[:5], NAN, device=device),
        q_norm=torch.randn(head_dim).to(device, dtype) if norm else None,
        k_norm=torch.randn(head_dim).to(device, dtype) if norm else None,
    )


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding of the result's type, beside float32's own along the way; NaN exactly where NaN belongs."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), expected.float(), rtol=eps, atol=1e-5, equal_nan=True)


def values_of(frames: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return frames.float() if scales is None else frames.float() * scales[..., None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: dict[str, Any], device: torch.device) -> None:
    got = step(
        *(case["tokens"], case["heads"], case["head_dim"], device, case["dtype"], case["stored"]),
        kind=case["pool"],
        norm=case["norm"],
    )
    expected, before = got.copy(), got.copy()
    rope_write(*got.given())
    rope_write_reference(*expected.given())
    near(got.q, expected.q)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in ((got.k, before.k), (got.v, before.v)))
    if got.kv_scales is None or expected.kv_scales is None:
        near(got.frames, expected.frames)
        return
    torch.testing.assert_close(got.kv_scales, expected.kv_scales, rtol=1e-5, atol=0, equal_nan=True)
    of_type = torch.finfo(torch.float8_e4m3fn).eps if case["stored"] != torch.int8 else 0.0
    torch.testing.assert_close(  # a value between two that the type holds may go either way
        values_of(got.frames, got.kv_scales),
        values_of(expected.frames, expected.kv_scales),
        rtol=of_type + 1e-5,
        atol=1.01 * float(expected.kv_scales.nan_to_num().max()),
        equal_nan=True,
    )
    same = (got.frames.float() == expected.frames.float()) | got.frames.float().isnan()
    assert float(same.float().mean()) > 0.99  # and few values lie so


@pytest.mark.parametrize("stored", list(LARGEST), ids=str)
def test_an_eighth_of_a_byte_is_all_that_is_lost(stored: torch.dtype, device: torch.device) -> None:
    """What is read back is what was given, but for one rounding to eight bits; a vector of zeros stays zero."""
    given = step(9, (4, 2), 64, device, stored=stored)
    given.v[0] = 0.0
    given.v[1] *= 1e4
    v, (pages, slots) = given.v.clone(), (given.pages.long(), given.slots.long())
    rope_write(*given.given())
    assert given.kv_scales is not None
    back = values_of(given.frames, given.kv_scales)[pages, :, 1, 1, slots]
    largest = v.abs().amax(-1, keepdim=True)
    error = (back - v).abs()
    real = given.pages >= 0
    within = v.abs() / 16 + largest / 448 / 1024 if stored != torch.int8 else largest / 127 / 2
    assert bool((error <= within * 1.001)[real].all())
    assert bool((back[0] == 0).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_it_does_what_the_cpu_does_in_three_steps(dtype: torch.dtype, device: torch.device) -> None:
    """The CPU rounds the angles and the products to the type on the way, so narrow types differ by some roundings."""
    given = step(3, (4, 2), 64, device, dtype)
    expected = given.copy()
    rope_write(*given.given())
    turned = angles(expected.positions, expected.inv_freq, dtype)
    near_cpu = 4 * torch.finfo(dtype).eps * float(expected.q.float().abs().max())
    torch.testing.assert_close(given.q.float(), rope(expected.q, turned).float(), rtol=0, atol=near_cpu)
    rows = write_rows(expected.frames.cpu(), expected.pages.long().cpu().numpy(), expected.slots.long().cpu().numpy())
    k, v = rope(expected.k, turned), expected.v.contiguous()
    page_write(expected.frames, expected.layer, k, v, rows.to(device))
    torch.testing.assert_close(given.frames.float(), expected.frames.float(), rtol=0, atol=near_cpu, equal_nan=True)
    assert torch.equal(given.frames[:, :, 1, 1].nan_to_num(), expected.frames[:, :, 1, 1].nan_to_num())


def test_long_contexts_turn_by_the_same_angles(device: torch.device) -> None:
    given = step(3, (2, 1), 64, device)
    given.positions = torch.tensor([131071, 1_000_003, 16_777_215], device=device)
    expected = given.copy()
    rope_write(*given.given())
    rope_write_reference(*expected.given())
    torch.testing.assert_close(given.q, expected.q, rtol=1e-6, atol=2e-6)


def test_cosine_and_sine_are_good_to_a_rounding_at_any_position(device: torch.device) -> None:
    """Read off a key of ones and zeros, against float64."""
    positions = torch.cat((torch.arange(40), torch.randint(0, 2**24, (40,))))
    given = step(80, (1, 1), 4, device)
    given.q.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    given.pages.fill_(0)
    given.slots.fill_(0)  # who writes last does not matter here
    given.positions, given.inv_freq = positions.to(device), torch.tensor([1.0, 0.37], device=device)
    rope_write(*given.given())
    angle = (positions.to(device).float()[:, None] * given.inv_freq).double()
    for got, exact in ((given.q[:, 0, :2], angle.cos()), (given.q[:, 0, 2:], angle.sin())):
        torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=4e-8)


def test_enough_tokens_for_wide_programs(device: torch.device) -> None:
    given = step(2 * 132, (1, 1), 4, device)
    given.pages[70:] = -1  # the interpreter is slow
    expected = given.copy()
    rope_write(*given.given())
    rope_write_reference(*expected.given())
    near(given.frames, expected.frames)


def test_offsets_beyond_31_bits(device: torch.device) -> None:
    given = step(2, (2, 1), 64, device, stored=torch.int8)
    apart = 2**28
    memory = torch.empty(8 * apart + 3 * 2 * 16 * 64, dtype=torch.int8, device=device)  # touched here and there only
    given.frames = memory.as_strided((9, 1, 3, 2, 16, 64), (apart, 0, 2048, 1024, 64, 1))
    given.kv_scales = torch.full((9, 1, 3, 2, 16), NAN, device=device)
    given.pages, given.slots = torch.tensor([8, 0], device=device).int(), torch.tensor([15, 2], device=device).int()
    rope_write(*given.given())
    for token, (page, slot) in enumerate([(8, 15), (0, 2)]):
        scale = given.kv_scales[page, 0, 1, 1, slot]
        back = given.frames[page, 0, 1, 1, slot].float() * scale
        torch.testing.assert_close(back, given.v[token, 0], rtol=0, atol=0.51 * float(scale))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    given = step(2, (4, 2), 64, device)
    fp8 = step(2, (4, 2), 64, device, stored=torch.float8_e4m3fn)
    wrong = [
        dataclasses.replace(given, k=given.k[:, :1]),
        dataclasses.replace(given, v=given.v[..., :32]),
        dataclasses.replace(given, layer=3),
        dataclasses.replace(given, pages=given.pages.long()),
        dataclasses.replace(given, slots=given.slots[:1]),
        dataclasses.replace(given, inv_freq=given.inv_freq[:16]),
        dataclasses.replace(given, frames=given.frames.to(BF16)),
        dataclasses.replace(given, q_norm=given.inv_freq),
        dataclasses.replace(given, kv_scales=torch.ones(given.frames.shape[:5], device=device)),
        dataclasses.replace(fp8, kv_scales=None),
        dataclasses.replace(fp8, kv_scales=torch.ones(3, device=device)),
    ]
    for step_ in wrong:
        with pytest.raises(AssertionError):
            rope_write(*step_.given())
