"""What one worker says of itself in the registry: that it starts, serves, drains; and that it has gone.

    starting --self-test--> ready --told to stop--> draining --withdrawn

It never goes back. Without a registry the states are the same, and nobody is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from baton.registry_link import RegistryLink
from baton.self_test import SelfTest, Verdict
from core.messages import WorkerInfo
from core.registry.records import WorkerRecord, WorkerState
from core.registry.registry import Registry

log = logging.getLogger(__name__)

SNAPSHOT_S = 2.0  # a registry that has told nothing by then is away
RETRY_S = 2.0  # between two self-tests

ORDER = (WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING)
NOBODY: Mapping[str, WorkerRecord] = MappingProxyType({})


class Membership:
    """One worker's. `model` and `labels` are those of core.registry.records."""

    def __init__(
        self,
        link: RegistryLink | None,
        info: WorkerInfo,
        endpoint: str,
        *,
        model: str = "",
        labels: Mapping[str, str] = MappingProxyType({}),
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._link = link
        self._registry = link.registry if link is not None else None
        self._record = WorkerRecord(info, endpoint, WorkerState.STARTING, dict(labels), model)
        self._pause = pause
        self._gone = False

    @property
    def state(self) -> WorkerState:
        return self._record.state

    @property
    def endpoint(self) -> str:
        """Where routers and peers reach it."""
        return self._record.endpoint

    def has_successor(self) -> bool:
        """Whether another worker that is ready could do what this one does. Without a registry none is known."""
        mine = self._record
        known = {} if self._registry is None else self._registry.snapshot.records
        others = [r for r in known.values() if r.state is WorkerState.READY and r.worker != mine.worker]
        return any(r.info.role is mine.info.role and r.info.identity == mine.info.identity for r in others)

    def announce(self, state: WorkerState, trouble: str = "") -> None:
        """Tell everybody soon. A worker that drains does not become ready any more."""
        if self._gone or ORDER.index(state) < ORDER.index(self.state):
            return
        record = self._record
        self._record = WorkerRecord(record.info, record.endpoint, state, record.labels, record.model, trouble)
        if self._registry is not None:
            self._registry.announce(self._record)

    async def withdraw(self) -> None:
        """For good, after `keep` has been cancelled. With the store away the record ends by itself."""
        self._gone = True
        if self._registry is not None:
            await self._registry.withdraw(self._record.worker)

    async def keep(self, test: SelfTest, ready: Callable[[], None]) -> None:
        """Keep the record, from its start on. `ready` is called when it says so. Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._registry is not None:
                group.create_task(self._registry.run())
            await self.become_ready(test)
            if self.state is WorkerState.READY:
                ready()
            await asyncio.Event().wait()

    async def close(self) -> None:
        """After everything else."""
        if self._link is not None:
            await self._link.close()

    async def become_ready(self, test: SelfTest) -> None:
        """Announce that it starts, then, after a self-test, that it is ready. Returns when that is so."""
        self.announce(WorkerState.STARTING)
        if self._registry is not None:
            await self._until_read(self._registry)
        while not (verdict := await self._verdict(test)).passed:
            log.warning("not ready, trying again: %s", verdict.why)
            self.announce(WorkerState.STARTING, verdict.why)
            await self._pause(RETRY_S)
        log.info("ready: %s", verdict.why)
        self.announce(WorkerState.READY)

    async def _verdict(self, test: SelfTest) -> Verdict:
        if self._registry is None:
            return Verdict(True, "without a registry there is nobody to try a path with")
        if self._registry.snapshot.read_s is None:
            return Verdict(True, "the registry is away, so no path was tried")
        return await test(self._registry.snapshot.records)

    async def _until_read(self, registry: Registry) -> None:
        try:
            async with asyncio.timeout(SNAPSHOT_S):
                while registry.snapshot.read_s is None:
                    await registry.changed()
        except TimeoutError:
            log.warning("the registry does not answer: this worker is announced when it does")
