"""Writes the keys and values of one layer's new tokens into their pages.

    frames [N, K, L, 2, P, D]; k [T, K, D], v [T, K, D]; rows [T * K] from `write_rows`; layer  →  frames, changed

No two tokens of a batch share a slot, so the order of writing does not matter.
"""

from __future__ import annotations

import torch

from kernels.page_address import LAYER, PART, Int64Array, flat, rows_per, vector_rows


def write_rows(frames: torch.Tensor, pages: Int64Array, slots: Int64Array) -> torch.Tensor:
    """[T * K] int64: computed once per step, used by every layer."""
    return torch.from_numpy(vector_rows(frames, pages, slots).reshape(-1))


def page_write_reference(
    frames: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, pages: Int64Array, slots: Int64Array
) -> None:
    for token, (page, slot) in enumerate(zip(pages.tolist(), slots.tolist(), strict=True)):
        frames[page, :, layer, 0, slot] = k[token]
        frames[page, :, layer, 1, slot] = v[token]


def page_write(frames: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> None:
    tokens, heads, head_dim = k.shape
    assert v.shape == k.shape and frames.shape[1] == heads and frames.shape[5] == head_dim, (k.shape, frames.shape)
    assert rows.shape == (tokens * heads,), (rows.shape, k.shape)
    assert k.dtype == v.dtype == frames.dtype, (k.dtype, v.dtype, frames.dtype)
    assert 0 <= layer < frames.shape[2], layer
    vectors = flat(frames, head_dim)
    to_layer = layer * rows_per(frames, LAYER, head_dim)
    to_value = to_layer + rows_per(frames, PART, head_dim)
    vectors[to_layer:].index_copy_(0, rows, k.reshape(-1, head_dim))
    vectors[to_value:].index_copy_(0, rows, v.reshape(-1, head_dim))
