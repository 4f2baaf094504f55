"""How long a cancelled attempt still keeps pages from others: from the cancel until its last holder has let go.

A page may be held back by the step that uses it, by a lease until its readers have drained, or by a fetch that may
still write into it. Each of them is a holder; what nobody has cancelled is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock

Key = tuple[str, int]  # request id, attempt
LIMIT = 4096  # cancelled attempts that are timed at once; the hand-off's deadlines end each of them


@dataclass(slots=True)
class _Cancelled:
    since_s: float
    holders: int


class Reclaims:
    """Owned by the worker's event loop."""

    def __init__(self, clock: Clock, observe: Callable[[float], None]) -> None:
        self._clock = clock
        self._observe = observe
        self._cancelled: dict[Key, _Cancelled] = {}
        self._watched: list[tuple[Key, Callable[[], bool]]] = []

    def cancelled(self, key: Key) -> None:
        """The clock of this attempt runs; the caller is its first holder, and lets go when it has told the others."""
        if key in self._cancelled:
            self._cancelled[key].holders += 1
        elif len(self._cancelled) < LIMIT:
            self._cancelled[key] = _Cancelled(self._clock(), 1)

    def hold(self, key: Key) -> None:
        """Something holds back pages of it."""
        found = self._cancelled.get(key)
        if found is not None:
            found.holders += 1

    def hold_until(self, key: Key, is_back: Callable[[], bool]) -> None:
        """The engine holds its pages back until `is_back`, which is asked at the end of every step."""
        if not is_back():
            self.hold(key)
            self._watched.append((key, is_back))

    def let_go(self, key: Key) -> None:
        """One holder less; the last one ends it."""
        found = self._cancelled.get(key)
        if found is None:
            return
        found.holders -= 1
        if not found.holders:
            del self._cancelled[key]
            self._observe(self._clock() - found.since_s)

    def stepped(self) -> None:
        """A step has ended, and what left during it has given its pages back."""
        watched, self._watched = self._watched, []
        for key, is_back in watched:
            if is_back():
                self.let_go(key)
            else:
                self._watched.append((key, is_back))
