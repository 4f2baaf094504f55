"""Requests that have cost workers, known to every router: the second router does not try what killed the first's.

A note says that one worker was lost while it had one content (a hash of the request, not its id), and had answered
nothing to it. A content with two such notes, of two workers, is poison; several requests with it, or several routers,
that lost the same worker are one note. Whoever was lost beside the culprit is cleared as soon as its content has been
answered anywhere. Notes are kept here too, so that they hold while the store is away; all are bounded, and forgotten
after `life_s`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from core.clock import Clock
from core.errors import RegistryAway
from core.messages import WorkerId
from core.registry.store import MAX_NAMES, Store

log = logging.getLogger(__name__)

GROUP = "poison"
LIFE_S = 600.0
REFRESH_S = 1.0
MAX_WAITING = 1024  # notes that the store has not heard
COST, CLEARED = b"1", b"0"

Notes = dict[str, float]  # of one content: the worker that it cost -> until when that is held against it


class PoisonCounts:
    """How many workers each content has cost, over all routers that can be heard. `run` is what talks to the store."""

    def __init__(self, store: Store, clock: Clock, *, life_s: float = LIFE_S, limit: int = MAX_NAMES) -> None:
        self._store = store
        self._clock = clock
        self._life_s = life_s
        self._limit = limit
        self._mine: OrderedDict[str, Notes] = OrderedDict()  # by content
        self._told: dict[str, set[str]] = {}  # by content: the workers
        self._waiting: OrderedDict[str, bytes] = OrderedDict()  # to be written
        self._wake = asyncio.Event()

    def count(self, content: bytes) -> int:
        """Workers lost to this content, as known now. Waits for nobody."""
        return len(self._workers(content.hex()))

    def cost_a_worker(self, content: bytes, worker: WorkerId) -> None:
        """Here at once, and for all as soon as the store hears it."""
        key = content.hex()
        self._mine.setdefault(key, {})[str(worker)] = self._clock() + self._life_s
        self._mine.move_to_end(key)
        while len(self._mine) > self._limit:
            self._mine.popitem(last=False)
        self._write(key, str(worker), COST)

    def answered(self, content: bytes) -> None:
        """It is no poison: whatever is noted of it is forgotten."""
        key = content.hex()
        for worker in self._workers(key):
            self._write(key, worker, CLEARED)
        self._mine.pop(key, None)
        self._told.pop(key, None)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._wake.clear()
            await self.refresh()
            try:
                async with asyncio.timeout(REFRESH_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> None:
        """Write what is new, read what the others have noted. While the store is away, what was read last stands."""
        try:
            while self._waiting:
                name, value = next(iter(self._waiting.items()))
                await self._store.put(GROUP, name, value, self._life_s)
                if self._waiting.get(name) == value:
                    del self._waiting[name]
            values = await self._store.read(GROUP)
        except RegistryAway as error:
            log.debug("lost workers are noted here only: %s", error.message)
            return
        if not self._waiting:  # else what has just been cleared would come back
            self._take(values)

    def _take(self, values: dict[str, bytes]) -> None:
        """A note of ours that is missing was lost with the store's memory: it is written again."""
        self._told = {}
        for name, value in values.items():
            key, _, worker = name.partition(".")
            if value == COST:
                self._told.setdefault(key, set()).add(worker)
            elif key in self._mine:
                self._mine[key].pop(worker, None)
        for key in list(self._mine):
            for worker in self._alive(key) - self._told.get(key, set()):
                self._write(key, worker, COST)
            if not self._mine[key]:
                del self._mine[key]

    def _workers(self, key: str) -> set[str]:
        return self._alive(key) | self._told.get(key, set())

    def _alive(self, key: str) -> set[str]:
        now_s, notes = self._clock(), self._mine.get(key, {})
        for worker in [worker for worker, until_s in notes.items() if until_s <= now_s]:
            del notes[worker]
        return set(notes)

    def _write(self, key: str, worker: str, value: bytes) -> None:
        name = f"{key}.{worker}"
        self._waiting.pop(name, None)
        self._waiting[name] = value
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        self._wake.set()
