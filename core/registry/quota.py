"""A limit that several routers share: each holds a part of it, and the parts never add up to more.

Who wants more writes its larger part first and reads everybody's after that. Of two who write at the same time at
least one sees both, and takes back what is too much; nothing is used before it has been read back. A part lives under
a lease, so that a router which dies gives its part back. While the store is away a part stays as large as it was, and
nobody's grows; after it has come back, nobody's grows until everybody has had the time to write theirs again.
"""

from __future__ import annotations

import asyncio
import logging
from random import Random

from core.clock import Clock
from core.errors import RegistryAway
from core.registry.registry import RegistryTiming
from core.registry.store import Store

log = logging.getLogger(__name__)

STRIDE = 16  # a part grows by a sixteenth of the limit at a time: few calls, and some left for others


class Quota:
    """One router's part of one limit. `run` is the loop that keeps it."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        random: Random,
        *,
        name: str,
        router: str,
        limit: int,
        timing: RegistryTiming | None = None,
    ) -> None:
        assert limit >= 1, limit
        self._store = store
        self._clock = clock
        self._random = random
        self._group = f"quota:{name}"
        self._router = router
        self._limit = limit
        self._timing = timing or RegistryTiming()
        self._held = 0
        self._used = 0
        self._quiet_until_s = clock() + self._timing.renew_s  # we may be the ones who have just come back
        self._wake = asyncio.Event()

    @property
    def held(self) -> int:
        """How much may be used here."""
        return self._held

    def use(self, used: int) -> None:
        """So much of it is in use, or wanted, from now on. More than a part that is held makes it grow soon."""
        self._used = used
        if used > self._held - self._stride // 2 and self._held < self._limit:
            self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled; the part is given back then."""
        try:
            while True:
                self._wake.clear()
                await self._settle()
                await self._pause()
        finally:
            self._held = 0
            try:
                await self._store.remove(self._group, self._router)
            except RegistryAway:
                log.debug("our part of %s ends with its lease", self._group)

    @property
    def _stride(self) -> int:
        return max(1, self._limit // STRIDE)

    async def _settle(self) -> None:
        """Renew the part; let it follow what is used, within what the others leave."""
        wanted = min(self._limit, -(-(self._used + self._stride // 2) // self._stride) * self._stride)
        try:
            if wanted <= self._held or self._clock() < self._quiet_until_s:
                self._held = min(self._held, max(wanted, self._used))
                await self._write(self._held)
            else:
                await self._grow(wanted)
        except RegistryAway as error:
            self._quiet_until_s = self._clock() + self._timing.renew_s
            log.debug("our part of %s stays at %d: %s", self._group, self._held, error.message)

    async def _grow(self, wanted: int) -> None:
        before = await self._store.read(self._group)
        if self._held and self._router not in before:  # emptied just now: the others' parts are missing as well
            self._quiet_until_s = self._clock() + self._timing.renew_s
            await self._write(self._held)
            return
        await self._write(wanted)
        parts = await self._store.read(self._group)
        others = sum(_number(part) for router, part in parts.items() if router != self._router)
        if before.keys() <= parts.keys():
            self._held = max(self._held, min(wanted, self._limit - others))
        if self._held != wanted:
            await self._write(self._held)

    async def _write(self, part: int) -> None:
        await self._store.put(self._group, self._router, str(part).encode(), self._timing.life_s)

    async def _pause(self) -> None:
        """Until more is wanted, or the part has to be renewed; a wish that was not granted waits a moment."""
        await asyncio.sleep(self._timing.gap_s * self._random.uniform(0.5, 1.5))
        try:
            async with asyncio.timeout(self._timing.renew_s * self._random.uniform(0.8, 1.0)):
                await self._wake.wait()
        except TimeoutError:
            pass


def _number(part: bytes) -> int:
    """A part that cannot be read is taken for nothing: its owner writes it again."""
    return int(part) if part.isdigit() and len(part) < 10 else 0
