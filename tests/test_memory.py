"""How many pages fit beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import TooLittleMemory
from core.layout import PageLayout
from engine.architectures.registry import find_architecture
from engine.config import read_config
from engine.memory import SCRATCH_PAGES, page_layout, pages_that_fit, weight_bytes
from engine.safetensors_file import SafetensorsFile
from engine.weights import SINGLE_FILE
from tests.tiny_models import save_tiny

LAYOUT = PageLayout(kv_heads=2, layers=3, page_size=16, head_dim=8, dtype="float32")


def test_weights_take_what_their_file_takes(tmp_path: Path) -> None:
    config = read_config(save_tiny("qwen3", tmp_path))
    shapes = find_architecture(config.architecture).shapes(config)
    file = SafetensorsFile(tmp_path / SINGLE_FILE)
    assert weight_bytes(shapes, "float32") == sum(entry.end - entry.start for entry in file.entries.values())
    assert weight_bytes(shapes, "bfloat16") * 2 == weight_bytes(shapes, "float32")
    layout = page_layout(config, 32, "bfloat16")
    assert (layout.kv_heads, layout.layers, layout.page_size, layout.head_dim) == (4, 3, 32, 16)


def test_what_the_weights_leave_is_cut_into_pages() -> None:
    budget = 1000 + 10 * LAYOUT.page_bytes
    assert pages_that_fit(budget, 1000, LAYOUT, 100) == 10
    assert pages_that_fit(budget - 1, 1000, LAYOUT, 100) == 9


@pytest.mark.parametrize("tokens", [1, 16, 17, 1000])
def test_one_sequence_of_the_longest_context_must_fit(tokens: int) -> None:
    needed = SCRATCH_PAGES + LAYOUT.pages_for(tokens)
    assert pages_that_fit(needed * LAYOUT.page_bytes, 0, LAYOUT, tokens) == needed
    for budget, held in ((needed * LAYOUT.page_bytes - 1, 0), (needed * LAYOUT.page_bytes, 1), (0, 10**9)):
        with pytest.raises(TooLittleMemory, match=f"{needed * LAYOUT.page_bytes + held - budget} bytes more"):
            pages_that_fit(budget, held, LAYOUT, tokens)
