"""RMSNorm on the GPU: plain, by head, and with the residual, against the references of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gpu.rms_norm import MAX_WIDTH, add_rms_norm, add_rms_norm_reference, rms_norm
from kernels.rms_norm import rms_norm_reference
from tests.kernels_gpu.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
CASES = pairwise({"dtype": DTYPES, "tokens": [0, 1, 3, 17], "width": [1, 40, 64, 1000, 2048], "gap": [0, 8, 24]})
BY_HEAD = pairwise({"dtype": DTYPES, "tokens": [1, 5, 40], "heads": [1, 3, 8], "width": [64, 80, 128, 256]})


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the result's type; in float32 some more, for sums in another order and a GPU's root."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    eps = max(torch.finfo(got.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.float(), expected.float(), rtol=eps, atol=1e-7)


def in_a_gap(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values as rows of a wider tensor that is NaN everywhere else."""
    wide = values.new_full((len(values), values.shape[1] + gap), float("nan"))
    found = wide[:, : values.shape[1]]
    found.copy_(values)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case: dict[str, Any], device: torch.device) -> None:
    torch.manual_seed(case["tokens"])
    x = (torch.randn(case["tokens"], case["width"]) * 5).to(device, case["dtype"])
    weight = torch.randn(case["width"]).to(device, case["dtype"])
    near(rms_norm(in_a_gap(x, case["gap"]), weight, EPS), rms_norm_reference(x, weight, EPS))
    residual = torch.randn_like(x)
    kept = in_a_gap(residual, case["gap"])
    out = in_a_gap(torch.zeros_like(x), case["gap"])
    normed, total = add_rms_norm(in_a_gap(x, case["gap"]), kept, weight, EPS, out)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, EPS)
    assert normed is out and total is kept and torch.equal(kept, expected_total)
    near(normed, expected)
    if case["gap"] and case["tokens"]:
        for written in (kept, out):  # nothing beside the rows
            beside = written.as_strided((case["tokens"], case["gap"]), written.stride(), case["width"])
            assert bool(beside.isnan().all())


@pytest.mark.parametrize("case", BY_HEAD, ids=str)
def test_heads_of_a_fused_projection_are_normed_where_they_lie(case: dict[str, Any], device: torch.device) -> None:
    tokens, heads, width = case["tokens"], case["heads"], case["width"]
    torch.manual_seed(heads)
    fused = torch.randn(tokens, heads + 2, width).to(device, case["dtype"])
    fused[:, heads:] = float("nan")
    q, weight = fused[:, :heads], torch.randn(width).to(device, case["dtype"])
    expected = rms_norm_reference(q, weight, EPS)
    near(rms_norm(q, weight, EPS), expected)
    assert rms_norm(q, weight, EPS, out=q) is q
    near(q, expected)
    assert bool(fused[:, heads:].isnan().all())


def test_rows_that_share_programs_end_where_they_end(device: torch.device) -> None:
    rows = 2 * 132 * 3 - 1
    around = torch.full((3, rows + 4, 8), 7.0, device=device)
    x, residual, out = around[:, :rows]
    x.normal_()
    residual.normal_()
    expected, total = add_rms_norm_reference(x, residual, x[0], EPS)
    add_rms_norm(x, residual, x[0].clone(), EPS, out)
    near(out, expected)
    near(residual, total)
    assert bool((around[:, rows:] == 7.0).all())


@pytest.mark.parametrize("width", [5120, MAX_WIDTH])
def test_wide_rows(width: int, device: torch.device) -> None:
    x, weight = torch.randn(2, width, device=device), torch.randn(width, device=device)
    near(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


def test_large_halves_do_not_overflow(device: torch.device) -> None:
    x = torch.full((1, 8), 60000.0, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), EPS), torch.ones_like(x))


def test_a_token_of_nan_harms_no_other(device: torch.device) -> None:
    x, weight = torch.randn(600, 64, device=device), torch.randn(64, device=device)
    expected = rms_norm_reference(x, weight, EPS)
    x[7] = float("nan")
    normed = rms_norm(x, weight, EPS)
    assert bool(normed[7].isnan().all())
    near(torch.cat((normed[:7], normed[8:])), torch.cat((expected[:7], expected[8:])))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(AssertionError):
        rms_norm(x, torch.ones(7, device=device), EPS)
    with pytest.raises(AssertionError):
        rms_norm(x, torch.ones(8, device=device, dtype=torch.bfloat16), EPS)
    with pytest.raises(AssertionError):
        rms_norm(x[:, ::2], torch.ones(4, device=device), EPS)
    with pytest.raises(AssertionError):
        rms_norm(torch.ones(1, MAX_WIDTH + 1, device=device), torch.ones(MAX_WIDTH + 1, device=device), EPS)
    with pytest.raises(AssertionError):
        add_rms_norm(x, torch.ones(2, 9, device=device), torch.ones(8, device=device), EPS)
