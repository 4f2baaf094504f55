"""Where a token's vector and a page's block lie in a pool of frames [N, K, L, 2, P, D], by strides.

A frame may be padded or its dimensions reordered: only D, and for blocks P and D, must be dense. Rows are numbered in
units of their width from the pool's first element, in 64 bits: a pool of tens of GB overflows 32.

    vector   D elements: one token, one head, one layer, one part     → row of flat(frames, D)
    block    P x D elements: one page, one head, one layer, one part  → row of flat(frames, P * D)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

PAGE, HEAD, LAYER, PART, TOKEN = range(5)

Int64Array = npt.NDArray[np.int64]


def flat(frames: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, width] over the same memory, whatever the order of the frame's dimensions."""
    assert frames.dim() == 6 and frames.stride(5) == 1, (frames.shape, frames.stride())
    reach = 1 + sum((size - 1) * stride for size, stride in zip(frames.shape, frames.stride(), strict=True))
    assert reach % width == 0, (reach, width)
    return frames.as_strided((reach // width, width), (width, 1))


def rows_per(frames: torch.Tensor, dim: int, width: int) -> int:
    """Rows of `width` elements between neighbours along `dim`."""
    stride = frames.stride(dim)
    assert stride % width == 0, (dim, stride, width)
    return stride // width


def vector_rows(frames: torch.Tensor, pages: Int64Array, slots: Int64Array) -> Int64Array:
    """[T, K]: the row of each token and head in layer 0, part K; pages [T], slots [T]."""
    width = frames.shape[5]
    heads = np.arange(frames.shape[1], dtype=np.int64) * rows_per(frames, HEAD, width)
    tokens = pages * rows_per(frames, PAGE, width) + slots * rows_per(frames, TOKEN, width)
    return tokens[:, None] + heads


def block_rows(frames: torch.Tensor, pages: Int64Array) -> Int64Array:
    """[..., K, n]: the row of each head's block of each page in layer 0, part K; pages [..., n]."""
    width = frames.shape[4] * frames.shape[5]
    assert frames.stride(4) == frames.shape[5], frames.stride()
    heads = np.arange(frames.shape[1], dtype=np.int64) * rows_per(frames, HEAD, width)
    return pages[..., None, :] * rows_per(frames, PAGE, width) + heads[:, None]
