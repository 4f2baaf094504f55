"""How many programs keep a chip busy: every launcher that may choose its grid asks here."""

from __future__ import annotations

import torch

WITHOUT_A_GPU = 132  # multiprocessors of an H200: in the interpreter the grids are those of the real thing


def multiprocessors(device: torch.device) -> int:
    """Of the GPU that holds a tensor."""
    if device.type != "cuda":
        return WITHOUT_A_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
