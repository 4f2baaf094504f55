"""rms_norm, silu_mul, rope and linear against their references, over shapes and types."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.linear import BLOCK_BYTES, linear, linear_reference
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope import angles, inverse_frequencies, rope, rope_reference, scale_linear, scale_llama3
from kernels.silu_mul import silu_mul, silu_mul_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 2, 33])


def near(got: torch.Tensor, expected: torch.Tensor, ulps: float = 4.0) -> None:
    """Within some roundings of the result's type, of the largest value."""
    assert got.shape == expected.shape
    if got.numel():
        tolerance = ulps * torch.finfo(got.dtype).eps * max(1.0, float(expected.float().abs().max()))
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance)


@DTYPES
@TOKENS
@pytest.mark.parametrize("inner", [(64,), (3, 10)])
def test_rms_norm(dtype: torch.dtype, tokens: int, inner: tuple[int, ...]) -> None:
    torch.manual_seed(tokens)
    x, weight = (torch.randn(tokens, *inner) * 5).to(dtype), torch.randn(inner[-1]).to(dtype)
    near(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    residual = torch.randn_like(x)
    total = x + residual
    normed, kept = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(kept, total)
    near(normed, rms_norm_reference(total, weight, 1e-6))


def test_rms_norm_of_large_halves_does_not_overflow() -> None:
    x = torch.full((1, 8), 60000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones(1, 8, dtype=torch.float16))


@DTYPES
@TOKENS
def test_silu_mul(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    gate, up = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 40).to(dtype)
    expected = silu_mul_reference(gate.float(), up.float())
    near(silu_mul(gate, up), expected)


@DTYPES
@TOKENS
@pytest.mark.parametrize("head_dim", [2, 32, 128])
def test_rope(dtype: torch.dtype, tokens: int, head_dim: int) -> None:
    torch.manual_seed(tokens)
    x, positions = torch.randn(tokens, 3, head_dim).to(dtype), torch.randperm(4000)[:tokens]
    inv_freq = inverse_frequencies(head_dim, 10000.0)
    near(rope(x, angles(positions, inv_freq, dtype)), rope_reference(x, positions, inv_freq))


def test_rope_products_depend_on_the_distance_alone() -> None:
    inv_freq = inverse_frequencies(64, 10000.0)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def product(at_q: int, at_k: int) -> float:
        q_turned = rope(q, angles(torch.tensor([at_q]), inv_freq, torch.float32))
        return float((q_turned * rope(k, angles(torch.tensor([at_k]), inv_freq, torch.float32))).sum())

    assert math.isclose(product(9, 4), product(905, 900), rel_tol=1e-3, abs_tol=1e-3)


def test_scalings_of_rope() -> None:
    inv_freq = inverse_frequencies(64, 10000.0)
    assert torch.equal(scale_linear(inv_freq, 4.0), inv_freq / 4)
    scaled = scale_llama3(inv_freq, 8.0, 1.0, 4.0, 256)
    turns = 256 * inv_freq / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], inv_freq[turns > 4])
    assert torch.equal(scaled[turns < 1], inv_freq[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((scaled < inv_freq) & (scaled > inv_freq / 8))[between].all()


@DTYPES
@TOKENS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 7), (50, 64), (BLOCK_BYTES // 4 // 512 + 3, 512)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype: torch.dtype, tokens: int, outputs: int, inputs: int, has_bias: bool) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    got = linear(x, weight, bias)
    assert got.dtype == dtype
    near(got, linear_reference(x, weight, bias), ulps=16)
