"""A limit that several routers share: each holds a part of it, and the parts never add up to more.

Who wants more writes its larger part first and reads everybody's after that. Of two who write at the same time at
least one sees both, and takes back what is too much; nothing is used before it has been read back. A part lives under
a lease, so that a router which dies gives its part back. While the store is away a part stays as large as it was, and
nobody's grows; after it has come back, nobody's grows until everybody has had the time to write theirs again.

Each router may have its fair share, the limit divided by their number, whenever it wants it: beside its part it
writes how much it wants, and whoever has more than the fair share gives back what others lack of theirs. What is in
use is given back as it ends. A router that uses little keeps a quarter of its fair share, for when the store is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random

from core.clock import Clock
from core.errors import RegistryAway
from core.registry.registry import RegistryTiming
from core.registry.store import Store

log = logging.getLogger(__name__)

STRIDE = 16  # a part grows by a sixteenth of the limit at a time: few calls, and some left for others
KEPT = 4  # an idle router keeps a fourth of its fair share

Parts = dict[str, tuple[int, int]]  # router -> what it holds, what it wants


def _nobody() -> None:
    """Nobody waits for more."""


class Quota:
    """One router's part of one limit. `run` is the loop that keeps it; `grown` is called when the part has grown."""

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
        self.grown: Callable[[], None] = _nobody
        self._store = store
        self._clock = clock
        self._random = random
        self._group = f"quota:{name}"
        self._router = router
        self._limit = limit
        self._timing = timing or RegistryTiming()
        self._held = 0  # as it is written
        self._target = 0  # at most what is held: the rest is in use, and given back as it ends
        self._used = self._wanted = 0
        self._heard = self._away = False
        self._lends = False  # it has more than its fair share
        self._quiet_until_s = clock() + self._timing.renew_s  # we may be the ones who have just come back
        self._wake = asyncio.Event()

    @property
    def held(self) -> int:
        """How much may be used here."""
        return self._target

    @property
    def is_away(self) -> bool:
        """It cannot grow now."""
        return self._away

    @property
    def was_heard(self) -> bool:
        """The store has been reached: `held` is what it has granted."""
        return self._heard

    def use(self, used: int, waiting: int = 0) -> None:
        """So much of it is in use from now on, and so much more would be. It makes a part that is too small grow."""
        self._used, self._wanted = used, used + waiting
        if self._wanted > self._target - self._stride // 2 and self._target < self._limit:
            self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled; the part is given back then."""
        try:
            while True:
                self._wake.clear()
                await self._settle()
                await self._pause()
        finally:
            self._held = self._target = 0
            try:
                await self._store.remove(self._group, self._router)
            except RegistryAway:
                log.debug("our part of %s ends with its lease", self._group)

    @property
    def _stride(self) -> int:
        return max(1, self._limit // STRIDE)

    async def _settle(self) -> None:
        """Renew the part; let it follow what is used, within what the others leave."""
        before = self._target
        try:
            await self._follow()
            self._away = False
        except RegistryAway as error:
            self._away = True
            self._quiet_until_s = self._clock() + self._timing.renew_s
            log.debug("our part of %s stays at %d: %s", self._group, self._held, error.message)
        if self._target > before:
            self.grown()

    async def _follow(self) -> None:
        parts = await self._read()
        emptied = self._held > 0 and self._router not in parts  # just now: the others' parts are missing as well
        if emptied:
            self._quiet_until_s = self._clock() + self._timing.renew_s
        fair = max(1, self._limit // len({*parts, self._router}))
        wish = min(self._limit, -(-(self._wanted + self._stride // 2) // self._stride) * self._stride)
        lacking = _lacking(parts, self._router, fair)
        target = max(wish, fair // KEPT)
        if lacking:
            target = min(target, max(fair, self._target - lacking))
        self._lends = target > fair
        if self._clock() < self._quiet_until_s or target <= self._target:
            await self._shrink(target, wish)
        else:
            await self._grow(target, wish, parts)

    async def _shrink(self, target: int, wish: int) -> None:
        """What is in use cannot be given back yet."""
        target = min(target, self._target)
        held = min(self._held, max(target, self._used))
        await self._write(held, wish)
        self._held, self._target = held, target
        self._heard = self._heard or self._clock() >= self._quiet_until_s

    async def _grow(self, target: int, wish: int, before: Parts) -> None:
        await self._write(max(target, self._held), wish)
        parts = await self._read()
        others = sum(held for router, (held, _) in parts.items() if router != self._router)
        held = self._held
        if before.keys() <= parts.keys():
            held = max(held, min(target, self._limit - others))
        if held != max(target, self._held):
            await self._write(held, wish)
        self._held = held
        self._target, self._heard = max(self._target, min(held, target)), True

    async def _read(self) -> Parts:
        return {router: _numbers(value) for router, value in (await self._store.read(self._group)).items()}

    async def _write(self, held: int, wish: int) -> None:
        await self._store.put(self._group, self._router, f"{held} {wish}".encode(), self._timing.life_s)

    async def _pause(self) -> None:
        """Until more is wanted, or the part has to be renewed; a wish that was not granted waits a moment.

        Whoever has more than the fair share looks more often whether others lack theirs.
        """
        await asyncio.sleep(self._timing.gap_s * self._random.uniform(0.5, 1.5))
        pause_s = self._timing.renew_s / (8 if self._lends or self._held > self._target else 1)
        try:
            async with asyncio.timeout(pause_s * self._random.uniform(0.8, 1.0)):
                await self._wake.wait()
        except TimeoutError:
            pass


def _lacking(parts: Parts, me: str, fair: int) -> int:
    """What the others want, and have not, of their fair shares."""
    return sum(max(0, min(fair, wish) - held) for router, (held, wish) in parts.items() if router != me)


def _numbers(value: bytes) -> tuple[int, int]:
    """A part that cannot be read is taken for nothing: its owner writes it again."""
    held, _, wish = value.partition(b" ")
    return _number(held), _number(wish)


def _number(digits: bytes) -> int:
    return int(digits) if digits.isdigit() and len(digits) < 10 else 0
