"""x @ weight.T + bias, in the arithmetic that is right and fast for the weight's type on this device.

    x [T, I], weight [O, I], bias [O] or None  →  [T, O]

float32 and bfloat16 go to the library. float16 on a CPU does not: without half-precision arithmetic its products are
at least 4 times slower than float32's and may be summed in half. There the weight is widened block by block into a
buffer that stays in the cache, multiplied in float32, and the result rounded to float16.
"""

from __future__ import annotations

import torch

BLOCK_BYTES = 1 << 20  # of widened weight; half of it is read, all of it is read back from the second-level cache


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = x.float() @ weight.float().T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, O] in x's type."""
    assert x.dim() == 2 and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return _widened(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    outputs, inputs = weight.shape
    block = max(1, min(outputs, BLOCK_BYTES // (4 * inputs)))
    wide_x = x.float()
    wide_weight = torch.empty(block, inputs)
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    for start in range(0, outputs, block):
        end = min(start + block, outputs)
        part = wide_weight[: end - start].copy_(weight[start:end])
        out[:, start:end] = torch.nn.functional.linear(wide_x, part, None if bias is None else bias[start:end].float())
    return out
