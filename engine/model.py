"""What the engine asks of a model, and what an architecture gives: the seam where plugins enter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import ModelConfig

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [T, H, D], k [T, K, D], v [T, K, D]) → [T, H, D]: keeps k and v in the pages, attends over them."""


class Model(Protocol):
    """Weights and the three stages of a forward pass. Holds no state of a step."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, E]."""
        ...

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, E], positions [T] → [M, E] for the M token indices `wanted` ([M] int64), before the head.

        `attend` is called once per layer, in order, for all T. May overwrite `hidden`.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, E] → [M, V], in the model's type."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """One name of config.json's `architectures`.

    `shapes` names every tensor that the checkpoint must hold, and `optional` those that it may hold and the model
    does not use (tied heads, old rotary buffers). `build` keeps the tensors as they are given: they may be views
    of the mapped file.
    """

    shapes: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]]
    optional: Callable[[ModelConfig], frozenset[str]]
    build: Callable[[ModelConfig, Mapping[str, torch.Tensor]], Model]
