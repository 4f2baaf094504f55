"""The event stream to one router: load when it changes, cache changes in order; dropped rather than waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from core.clock import Clock
from core.messages import Load, PagesChanged

MAX_PENDING = 64
HEARTBEAT_S = 0.5  # a router takes a worker for suspect that has been silent for several of these


class Feed:
    """Pure: the loop that polls it does the sending."""

    def __init__(self, snapshot: PagesChanged, clock: Clock) -> None:
        self._clock = clock
        self._pending: deque[PagesChanged] = deque([snapshot])
        self._load: Load | None = None
        self._sent_s = -HEARTBEAT_S
        self.overflowed = False  # the pending changes were dropped: a snapshot is due

    def changed(self, change: PagesChanged) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._pending.clear()
            self.overflowed = True
        if not self.overflowed:
            self._pending.append(change)

    def replace(self, snapshot: PagesChanged) -> None:
        self._pending.append(snapshot)
        self.overflowed = False

    def due(self, load: Load) -> Iterable[Load | PagesChanged]:
        """What is to be sent now."""
        now_s = self._clock()
        if load != self._load or now_s - self._sent_s >= HEARTBEAT_S:
            self._load, self._sent_s = load, now_s
            yield load
        while self._pending:
            yield self._pending.popleft()
