"""What the engine asks of a model, and what an architecture gives: the seam where plugins enter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from engine.config import ModelConfig
from engine.ops import Ops


class Rotary(NamedTuple):
    """What happens to queries and keys before they are used and kept: normed over D if there are weights, then turned.

    It goes with `Attend`, because a backend does it in one pass with the write into the pages.
    """

    inv_freq: torch.Tensor  # [D/2] float32
    q_norm: torch.Tensor | None = None  # [D]; both or none
    k_norm: torch.Tensor | None = None  # [D]
    eps: float = 0.0


class Attend(Protocol):
    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None = None
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H, D]: keeps k and v in the pages, attends over them.

        May overwrite q and k. Without `rotary` they are taken as they are.
        """
        ...


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
    of the mapped file. It owns the dictionary, and takes out what it packs: no weight is held twice for long.
    """

    shapes: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]]
    optional: Callable[[ModelConfig], frozenset[str]]
    build: Callable[[ModelConfig, dict[str, torch.Tensor], Ops], Model]
