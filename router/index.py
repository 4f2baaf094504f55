"""Which worker's prefix cache holds which blocks, from events. A hint: a wrong one costs time, never a token."""

from __future__ import annotations

from collections.abc import Sequence

from core.messages import PagesChanged


class PrefixIndex:
    """The blocks of one incarnation. `degraded` from a gap in the numbers until the next snapshot."""

    def __init__(self) -> None:
        self._blocks: set[bytes] = set()
        self._number = 0
        self.degraded = True

    def apply(self, change: PagesChanged) -> bool:
        """Take in a change. False when one before it is missing: a snapshot is needed."""
        if change.snapshot:
            self._blocks = set(change.stored)
            self._number = change.number
            self.degraded = False
            return True
        if change.number <= self._number:
            return True  # older than the snapshot that we have
        if change.number != self._number + 1:
            self.degraded = True
            return False
        self._number = change.number
        self._blocks.update(change.stored)
        self._blocks.difference_update(change.removed)
        return True

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many of a prompt's blocks, from the first on, are there."""
        for count, value in enumerate(hashes):
            if value not in self._blocks:
                return count
        return len(hashes)

    def __len__(self) -> int:
        return len(self._blocks)
