"""The point-wise operations of a decoder, as a backend gives them: plain torch unless it has better ones.

Attention and what goes with it (the norm of heads, rotation, the write into pages) enter by `engine.model.Attend`;
matrix products are the library's everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.silu_mul import silu_mul

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
AddNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Ops(NamedTuple):
    """Contracts in kernels/rms_norm.py and kernels/silu_mul.py.

    `packed`: the weights of products with the same input stand in one matrix, so that one launch computes them. That
    needs memory of the process's own: where weights are views of the mapped file they stay apart.
    """

    rms_norm: Norm = rms_norm
    add_rms_norm: AddNorm = add_rms_norm
    silu_mul: Gate = silu_mul
    packed: bool = False


PLAIN = Ops()
