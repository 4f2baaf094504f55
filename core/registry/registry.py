"""Who is alive, as one member of the cluster knows it: announces its own records, and keeps a snapshot of all.

A record lives for `life_s` and is renewed every `renew_s`. The snapshot is read every `poll_s`, and at once when
somebody tells of a change. While the store is away the last snapshot stands, and says how old it is: whether a worker
really lives, its session says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType

from core.clock import Clock
from core.errors import RegistryAway
from core.messages import WorkerId
from core.registry.records import WorkerRecord, decode
from core.registry.store import Store

log = logging.getLogger(__name__)

GROUP = "workers"


@dataclass(frozen=True, slots=True)
class RegistryTiming:
    """Seconds."""

    life_s: float = 6.0
    renew_s: float = 2.0
    poll_s: float = 1.0
    gap_s: float = 0.05  # between two reads, however many changes are told


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The workers by name, as last read. Never changed; a newer one takes its place."""

    records: Mapping[str, WorkerRecord] = field(default_factory=lambda: MappingProxyType({}))
    read_s: float | None = None  # on the reader's clock; None: never yet
    number: int = 0

    def age_s(self, now_s: float) -> float:
        """How long ago it was read; endless when it never was."""
        return float("inf") if self.read_s is None else now_s - self.read_s


class Registry:
    """One member's. `run` is the loop that keeps it; without it nothing is read or renewed."""

    def __init__(self, store: Store, clock: Clock, random: Random, timing: RegistryTiming | None = None) -> None:
        self._store = store
        self._clock = clock
        self._random = random
        self._timing = timing or RegistryTiming()
        self._mine: dict[WorkerId, WorkerRecord] = {}
        self._snapshot = Snapshot()
        self._changed = asyncio.Event()
        self._told = asyncio.Event()
        self._renew = asyncio.Event()
        self._away = False

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def is_away(self) -> bool:
        """The last read failed."""
        return self._away

    async def changed(self) -> None:
        """Returns when a snapshot with other records than the last one has been read."""
        await self._changed.wait()

    def announce(self, record: WorkerRecord) -> None:
        """Written soon, and again until it is withdrawn. Announcing again replaces it."""
        self._mine[record.worker] = record
        self._renew.set()

    async def withdraw(self, worker: WorkerId) -> None:
        """Take a record of ours back. When the store is away it ends by itself."""
        if self._mine.pop(worker, None) is None:
            return
        try:
            await self._store.remove(GROUP, worker.name)
            await self._store.tell(GROUP)
        except RegistryAway as error:
            log.info("%s is not withdrawn, and expires: %s", worker, error.message)

    async def run(self) -> None:
        """Until it is cancelled. What nobody foresaw in one of the loops is logged, and the loop goes on."""
        async with asyncio.TaskGroup() as group:
            for loop in (self._keep_renewing, self._keep_reading, self._keep_listening):
                group.create_task(self._keep(loop))

    async def _keep(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A store that misbehaves must not end a worker that serves."""
        while True:
            try:
                await loop()
            except Exception:
                log.exception("a loop of the registry has failed, and begins again")
                await asyncio.sleep(self._timing.poll_s)

    # --- our own records ---------------------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        while True:
            told = self._renew.is_set()
            self._renew.clear()
            await self._renew_all(told)
            pause_s = self._timing.renew_s * self._random.uniform(0.8, 1.0)  # members do not beat together
            await _first_of(self._renew, pause_s)

    async def _renew_all(self, told: bool) -> None:
        try:
            for worker, record in list(self._mine.items()):
                await self._store.put(GROUP, worker.name, record.encode(), self._timing.life_s)
            if told and self._mine:
                await self._store.tell(GROUP)
        except RegistryAway as error:
            log.debug("not renewed: %s", error.message)

    # --- everybody's -------------------------------------------------------------------------------------------

    async def _keep_reading(self) -> None:
        while True:
            self._told.clear()
            await self._read()
            await asyncio.sleep(self._timing.gap_s)
            await _first_of(self._told, self._timing.poll_s * self._random.uniform(0.8, 1.0))

    async def _read(self) -> None:
        try:
            values = await self._store.read(GROUP)
        except RegistryAway as error:
            if not self._away:
                log.warning("the registry is away; the last snapshot stands: %s", error.message)
            self._away = True
            return
        self._away = False
        found = {name: record for name, value in values.items() if (record := decode(value)) is not None}
        records = {name: record for name, record in found.items() if record.worker.name == name}
        if records != self._snapshot.records or self._snapshot.read_s is None:
            self._snapshot = Snapshot(MappingProxyType(records), self._clock(), self._snapshot.number + 1)
            self._changed.set()
            self._changed = asyncio.Event()
        else:
            self._snapshot = Snapshot(self._snapshot.records, self._clock(), self._snapshot.number)

    async def _keep_listening(self) -> None:
        while True:
            try:
                changes: AsyncIterator[None] = self._store.listen(GROUP)
                async with aclosing(changes):  # type: ignore[type-var]
                    async for _ in changes:
                        self._told.set()
            except RegistryAway as error:
                log.debug("not listening: %s", error.message)
            await asyncio.sleep(self._timing.poll_s)


async def _first_of(event: asyncio.Event, at_most_s: float) -> None:
    try:
        async with asyncio.timeout(at_most_s):
            await event.wait()
    except TimeoutError:
        pass
