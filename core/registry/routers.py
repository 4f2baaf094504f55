"""Which routers there are: each writes its address under a lease, and reads the others' from time to time.

Nothing depends on the list: it is for people, and for whoever wants to ask every router.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict, dataclass
from random import Random

from core.errors import RegistryAway
from core.registry.registry import RegistryTiming
from core.registry.store import Store

log = logging.getLogger(__name__)

VERSION = 1
GROUP = "routers"
MAX_BYTES = 1024


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """`router` is of this process alone, `name` what people call it; `address` is a URL."""

    router: str
    name: str
    address: str

    def encode(self) -> bytes:
        value = json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":")).encode()
        assert len(value) <= MAX_BYTES, len(value)
        return value


def decode(value: bytes) -> RouterRecord | None:
    """None for what this version cannot read."""
    if len(value) > MAX_BYTES:
        return None
    try:
        plain = json.loads(value)
        texts = plain["router"], plain["name"], plain["address"]
        known = plain["version"] == VERSION and all(isinstance(text, str) for text in texts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return RouterRecord(*texts) if known else None


class RouterList:
    """One router's. `run` is the loop that keeps it."""

    def __init__(self, store: Store, me: RouterRecord, random: Random, timing: RegistryTiming | None = None) -> None:
        self.me = me
        self._store = store
        self._random = random
        self._timing = timing or RegistryTiming()
        self._others: tuple[RouterRecord, ...] = ()

    @property
    def others(self) -> tuple[RouterRecord, ...]:
        """The others, by name."""
        return self._others

    async def run(self) -> None:
        """Until it is cancelled; our record is taken back then."""
        try:
            while True:
                await self._turn()
                await asyncio.sleep(self._timing.renew_s * self._random.uniform(0.8, 1.0))
        finally:
            try:
                await self._store.remove(GROUP, self.me.router)
            except RegistryAway:
                log.debug("our record ends with its lease")

    async def _turn(self) -> None:
        """While the store is away the last list stands."""
        try:
            await self._store.put(GROUP, self.me.router, self.me.encode(), self._timing.life_s)
            values = await self._store.read(GROUP)
        except RegistryAway as error:
            log.debug("the routers are not read: %s", error.message)
            return
        found = {router: decode(value) for router, value in values.items() if router != self.me.router}
        known = [record for router, record in found.items() if record is not None and record.router == router]
        self._others = tuple(sorted(known, key=lambda record: (record.name, record.router)))
