"""Requests that have cost workers, known to every router: the second router does not try what killed the first's.

A count belongs to the content of a request (a hash of it), not to its id: a client that sends it again is told at
once. Counts are kept here too, so that they hold while the store is away; both are bounded, and forget after `life_s`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from core.clock import Clock
from core.errors import RegistryAway
from core.registry.store import MAX_NAMES, Store

log = logging.getLogger(__name__)

GROUP = "poison"
LIFE_S = 600.0


class PoisonCounts:
    """How many workers each request has cost, over all routers that can be heard."""

    def __init__(self, store: Store, clock: Clock, *, life_s: float = LIFE_S, limit: int = MAX_NAMES) -> None:
        self._store = store
        self._clock = clock
        self._life_s = life_s
        self._limit = limit
        self._mine: OrderedDict[str, tuple[float, int]] = OrderedDict()  # name -> (until, count)
        self._told: dict[str, int] = {}

    def count(self, content: bytes) -> int:
        """Workers lost to this content, as known now. Waits for nobody."""
        name = content.hex()
        until_s, mine = self._mine.get(name, (0.0, 0))
        return max(mine if until_s > self._clock() else 0, self._told.get(name, 0))

    async def cost_a_worker(self, content: bytes) -> None:
        """Count one more, here at once and for all as soon as the store hears it."""
        name, now_s = content.hex(), self._clock()
        self._mine[name] = (now_s + self._life_s, self.count(content) + 1)
        self._mine.move_to_end(name)
        while len(self._mine) > self._limit:
            self._mine.popitem(last=False)
        try:
            total = await self._store.add(f"{GROUP}:{name}", 1, self._life_s)
            await self._store.put(GROUP, name, str(max(total, self._mine[name][1])).encode(), self._life_s)
        except RegistryAway as error:
            log.warning("a request's lost worker is counted here only: %s", error.message)

    async def refresh(self) -> None:
        """Read what the others have counted. While the store is away, what was read last stands."""
        try:
            values = await self._store.read(GROUP)
        except RegistryAway:
            return
        self._told = {name: int(value) for name, value in values.items() if value.isdigit() and len(value) < 10}
