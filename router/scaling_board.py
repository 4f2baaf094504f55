"""What scaling has decided for each tier, as a router reads it from the shared store, and how often that changed.

A decision that its author no longer writes is forgotten; while the store is away the last ones stand for their life.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping

from core.clock import Clock
from core.errors import RegistryAway
from core.registry import decisions
from core.registry.decisions import LIFE_S, Decision
from core.registry.store import Store

log = logging.getLogger(__name__)

READ_EVERY_S = 2.0
DIRECTIONS = ("up", "down")
MAX_TIERS = 64


class ScalingBoard:
    """`run` is the loop that keeps it; without a store there is nothing to read, and it stays empty."""

    def __init__(self, store: Store | None, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._decisions: dict[str, Decision] = {}
        self._read_s = clock()
        self._changes: Counter[tuple[str, str]] = Counter()

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """By tier."""
        return self._decisions

    @property
    def changes(self) -> Mapping[tuple[str, str], int]:
        """How often `desired` was seen to go up or down, by tier and direction."""
        return self._changes

    async def run(self) -> None:
        """Until it is cancelled."""
        while self._store is not None:
            await self.read()
            await asyncio.sleep(READ_EVERY_S)

    async def read(self) -> None:
        """Once."""
        assert self._store is not None
        try:
            found = await decisions.read(self._store)
        except RegistryAway as error:
            log.debug("no decisions are read: %s", error.message)
            if self._clock() - self._read_s > LIFE_S:
                self._decisions = {}
            return
        self._read_s = self._clock()
        new = dict(sorted(found.items())[:MAX_TIERS])
        for tier, decision in new.items():
            before = self._decisions.get(tier)
            if before is not None and before.desired != decision.desired:
                self._changes[tier, "up" if decision.desired > before.desired else "down"] += 1
        self._decisions = new
