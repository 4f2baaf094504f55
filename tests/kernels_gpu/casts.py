"""Casts between float types that round as a GPU does, for Triton's interpreter.

The interpreter cuts the bits of a float32 off where a GPU rounds to the nearest bfloat16, and where it does round (to
eight bits) it loses the carry into the exponent. torch casts as the hardware does, and many times faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

AS_TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
STORED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def use_exact_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone. Types that torch does not know are cast by the interpreter itself."""
    import triton.runtime.interpreter as interpreter

    theirs = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.name not in AS_TORCH or target.name not in AS_TORCH:
            return theirs(values, source, target, rounding_mode)
        wide = np.ascontiguousarray(values)
        bits = torch.from_numpy(wide.view(STORED[wide.itemsize]))
        cast = bits.view(AS_TORCH[source.name]).to(AS_TORCH[target.name])
        return cast.view(BITS[cast.element_size()]).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
