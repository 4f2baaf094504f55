"""The pools that every contender moves pages between, the order of the pages, and the check that they arrived.

Nothing but numpy is needed here: a contender in an environment of its own imports this too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from core.layout import PageLayout
from kvtransfer.frames import Frames

KV_HEADS = 8  # segments of a page, each with a digest of its own
UNIT_BYTES = 32 << 10  # one layer of such a page: 8 heads, K and V, 16 tokens of 64 bfloat16
BATCH_PAGES = 32  # of one fetch
IN_FLIGHT = 2  # fetches at a time

Pair = tuple[int, int]  # source page, target page


def make_pool(page_bytes: int, pool_bytes: int) -> Frames:
    """A pool as a worker has it, every byte of it touched."""
    layout = PageLayout(KV_HEADS, page_bytes // UNIT_BYTES, page_size=16, head_dim=64, dtype="bfloat16")
    assert layout.page_bytes == page_bytes, f"pages are multiples of {UNIT_BYTES} bytes"
    return Frames.shared(layout, pool_bytes // page_bytes)


def fill(frames: Frames) -> None:
    """Every 64-bit word of a page is the page's number plus one: wrong pages and holes are both seen."""
    words = np.frombuffer(frames.buffer, np.uint64).reshape(frames.pages, -1)
    words[:] = np.arange(1, frames.pages + 1, dtype=np.uint64)[:, None]


def walk(pages: int, page_bytes: int, total_bytes: int) -> Iterator[list[Pair]]:
    """Batches of pages, at random places of both pools, each pass in the same order: at least `total_bytes` of them."""
    sources, targets = list(range(pages)), list(range(pages))
    random.Random(1).shuffle(sources)
    random.Random(2).shuffle(targets)
    endless = itertools.cycle(zip(sources, targets, strict=True))
    for _ in range(max(1, -(-total_bytes // (page_bytes * BATCH_PAGES)))):
        yield list(itertools.islice(endless, BATCH_PAGES))


def wrong_pages(frames: Frames, pairs: list[Pair]) -> int:
    """How many of these do not hold what was filled into their source page."""
    words = np.frombuffer(frames.buffer, np.uint64).reshape(frames.pages, -1)
    return sum(not np.all(words[target] == source + 1) for source, target in pairs)
