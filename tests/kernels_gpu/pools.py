"""Pools of frames [N, K, L, 2, P, D] over memory of several shapes, with random bytes in all of it."""

from __future__ import annotations

import torch

KINDS = ("dense", "padded", "odd", "tokens first", "layers first")


def pool(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`odd`: the memory between two vectors, and before the first, is one element."""
    pages, heads, layers, parts, slots, dim = shape
    memory = {
        "dense": shape,
        "padded": (pages, heads + 1, layers, parts, slots + 8, dim),
        "odd": (pages, heads, layers, parts, slots, dim + 1),
        "tokens first": (pages, slots, layers, parts, heads, dim),
        "layers first": (layers, parts, pages, slots, heads, dim),
    }[kind]
    size = torch.Size(memory).numel() + 1
    bits = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype)
    frames = bits[1:].view(memory) if kind == "odd" else bits[:-1].view(memory)
    if kind == "tokens first":
        return frames.permute(0, 4, 2, 3, 1, 5)
    if kind == "layers first":
        return frames.permute(2, 4, 0, 1, 3, 5)
    return frames[:, :heads, :, :, :slots, :dim] if kind == "padded" else frames[..., kind == "odd" :]


def all_bytes(frames: torch.Tensor) -> torch.Tensor:
    """A copy of the whole memory behind a pool, what lies between its elements too: NaN equals NaN as bytes."""
    storage = frames.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=frames.device).set_(storage).clone()
