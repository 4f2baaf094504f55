"""Virtual time: what is due next, and nothing between."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Events:
    """Calls back in the order of time; at one time, in the order of asking."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (max(when_s, self.now_s), next(self._numbers), call))

    def run(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self._due)
            call()
        self.now_s = until_s
