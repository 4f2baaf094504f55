"""How many pages fit: a pure function of the budget, the weights and the layout."""

from __future__ import annotations

from collections.abc import Mapping

from core.errors import TooLittleMemory
from core.layout import ITEM_BYTES, PageLayout
from engine.config import ModelConfig

SCRATCH_PAGES = 1  # frame 0 holds no sequence


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """What the weights take in `dtype`."""
    total = 0
    for shape in shapes.values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total * ITEM_BYTES[dtype]


def page_layout(config: ModelConfig, page_size: int, dtype: str) -> PageLayout:
    """The dense frame of this model."""
    return PageLayout(config.kv_heads, config.layers, page_size, config.head_dim, dtype)


def pages_that_fit(budget_bytes: int, held_bytes: int, layout: PageLayout, max_context_tokens: int) -> int:
    """Pages of the pool, frame 0 included, in what `held_bytes` (weights and the like) leave of the budget.

    Raises TooLittleMemory when one sequence of the longest context would not fit.
    """
    pages = max(0, budget_bytes - held_bytes) // layout.page_bytes
    needed = SCRATCH_PAGES + layout.pages_for(max_context_tokens)
    if pages < needed:
        short = held_bytes + needed * layout.page_bytes - budget_bytes
        raise TooLittleMemory(
            f"{budget_bytes} bytes less {held_bytes} for the weights hold {pages} pages of {layout.page_bytes} bytes; "
            f"one sequence of {max_context_tokens} tokens needs {needed}: give {short} bytes more, "
            "or a shorter maximal context"
        )
    return pages
