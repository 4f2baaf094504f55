"""Which slot of the decode buffers each sequence has, and what must be written into its row of the page table.

A sequence keeps its slot while it is in every decode step, so that a step sends only the pages that are new: one in
`page_size` steps. Its list of pages only grows while it is the same object: a preempted sequence gets another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import Row
from kernels.page_address import Int64Array

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a captured step


def bucket_for(rows: int) -> int:
    return next(bucket for bucket in BUCKETS if bucket >= rows)


@dataclass(slots=True)
class Held:
    """One slot in use. `sampled` is the id that the device chose for it last, and still has; None: it has none."""

    slot: int
    pages: Sequence[int]
    written: int = 0  # pages in the table
    sampled: int | None = None


class RowSlots:
    def __init__(self, slots: int, width: int, page_size: int, pool_pages: int) -> None:
        """`width`: entries of a row of the table."""
        self._slots = slots
        self._width = width
        self._page_size = page_size
        self._pool_pages = pool_pages
        self._held: dict[int, Held] = {}  # by sequence
        self._free = list(range(slots))

    def place(self, rows: Sequence[Row]) -> tuple[list[Held], Int64Array]:
        """Each row's slot; and [2, n]: places in the flat table and the pages to write there."""
        assert len(rows) <= self._slots, (len(rows), self._slots)
        self._free_others({row.sequence_id for row in rows})
        if self._held and bucket_for(1 + max(held.slot for held in self._held.values())) > bucket_for(len(rows)):
            self.forget()  # many have left: move together, into a smaller bucket
        held = [self._of(row) for row in rows]
        places: list[int] = []
        pages: list[int] = []
        for row, own in zip(rows, held, strict=True):
            needed = row.start // self._page_size + 1
            if own.written < needed:
                first = own.slot * self._width
                places += range(first + own.written, first + needed)
                pages += row.pages[own.written : needed]
                own.written = needed
        assert not pages or (min(pages) >= 0 and max(pages) < self._pool_pages), (min(pages), max(pages))
        return held, np.array([places, pages], dtype=np.int64)

    def forget(self) -> None:
        """All slots are free: what the device holds of them is not used again."""
        self._held.clear()
        self._free = list(range(self._slots))

    def _of(self, row: Row) -> Held:
        held = self._held.get(row.sequence_id)
        if held is None:
            held = self._held[row.sequence_id] = Held(heapq.heappop(self._free), row.pages)
        elif held.pages is not row.pages:
            held = self._held[row.sequence_id] = Held(held.slot, row.pages)
        return held

    def _free_others(self, present: set[int]) -> None:
        for sequence_id in [known for known in self._held if known not in present]:
            heapq.heappush(self._free, self._held.pop(sequence_id).slot)
