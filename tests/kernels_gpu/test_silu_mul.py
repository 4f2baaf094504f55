"""The gate of a feed-forward layer on the GPU, as two tensors and as one, against the reference of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.gpu.silu_mul import silu_mul, silu_mul_packed, silu_mul_wide_reference
from tests.kernels_gpu.pairwise import pairwise

CASES = pairwise(
    {
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "tokens": [0, 1, 3, 7],
        "width": [1, 40, 512, 1000, 2050],
        "gap": [0, 8],
    }
)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the result's type, element by element; a GPU's exponential loses some bits of float32."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    eps = max(torch.finfo(got.dtype).eps, 1e-5)
    torch.testing.assert_close(got.float(), expected.float(), rtol=eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_forms(case: dict[str, Any], device: torch.device) -> None:
    tokens, width, gap = case["tokens"], case["width"], case["gap"]
    torch.manual_seed(width)
    wide = torch.full((tokens, 2 * width + gap), float("nan")).to(device, case["dtype"])
    packed = wide[:, : 2 * width]
    packed.copy_(torch.randn(tokens, 2 * width) * 4)
    gate, up = packed.chunk(2, dim=1)
    expected = silu_mul_wide_reference(gate, up)
    before = packed.clone()
    near(silu_mul_packed(packed), expected)
    out = torch.full_like(expected, float("nan"))
    assert silu_mul(gate, up, out) is out
    near(out, expected)
    assert torch.equal(packed, before)
    assert silu_mul(gate, up) is gate
    near(gate, expected)
    assert torch.equal(up, before[:, width:]) and bool(wide[:, 2 * width :].isnan().all())


def test_extremes(device: torch.device) -> None:
    gate = torch.tensor([[-200.0, -1e30, 1e30, 0.0, float("inf"), float("nan"), 88.0, -88.0]], device=device)
    up = torch.full_like(gate, 0.5)
    with np.errstate(over="ignore"):  # exp(200) is infinite, and its reciprocal zero, as it should be
        near(silu_mul(gate.clone(), up), silu_mul_wide_reference(gate, up))


def test_many_rows(device: torch.device) -> None:
    """Enough for the wide blocks."""
    packed = torch.randn(300, 64, device=device)
    near(silu_mul_packed(packed), silu_mul_wide_reference(packed[:, :32], packed[:, 32:]))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(AssertionError):
        silu_mul(x, x[:, :7])
    with pytest.raises(AssertionError):
        silu_mul(x, x.bfloat16())
    with pytest.raises(AssertionError):
        silu_mul(x.t(), x.t())
    with pytest.raises(AssertionError):
        silu_mul_packed(x[:, :7])
