"""The kernels run compiled where a GPU is, and in Triton's interpreter where none is."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests.kernels_gpu.casts import use_exact_casts
from tests.kernels_gpu.quick_calls import patch_once_per_kernel

COMPILED = torch.cuda.is_available()

if not COMPILED:  # Triton looks when it is imported, and again at each kernel's definition
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/kernels_gpu could ask for its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test belong."""
    return torch.device("cuda" if COMPILED else "cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds as the hardware does, and does not prepare itself again and again."""
    if not COMPILED:
        use_exact_casts(monkeypatch)
        patch_once_per_kernel(monkeypatch)
