"""Which workers the router has sessions with: those that it was told by name, and those that the registry names.

A session is opened to every ready or draining worker of the router's own model. Whether a worker lives, its session
says, not its record: a record that lapses because the store is away or was emptied ends nothing. A session ends when
its worker is lost and the registry does not name it any more. A record that names another place for a worker opens a
second session, and the first one ends when that has found another incarnation there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.errors import NoCapacity
from core.messages import PathReport, Peer, Role, WorkerId, WorkerInfo
from core.registry.records import WorkerRecord, WorkerState
from core.registry.registry import Registry
from router.path_survey import Member
from router.workers import Workers

log = logging.getLogger(__name__)

MAX_WORKERS = 1024
LOOK_S = 0.5  # how often it is seen which sessions are lost
NEEDED = frozenset({Role.PREFILL, Role.DECODE})

Place = tuple[str, str]  # a worker's name, and its endpoint
Fingerprint = tuple[str, str]  # identity and layout: workers of one can hand over to each other


class Session(Protocol):
    """router.client.WorkerClient."""

    @property
    def worker(self) -> WorkerId | None:
        """While it counts as up."""
        ...

    async def run(self) -> None: ...

    async def health(self) -> float: ...

    async def metrics(self) -> bytes: ...

    async def paths(self, probe: Peer | None, ticket: bytes) -> Sequence[PathReport]: ...


@dataclass(slots=True)
class _Open:
    session: Session
    running: asyncio.Task[None]


class Members:
    """`connect` makes the session with an endpoint. `named`: endpoints by name. `model`: core.registry.records."""

    def __init__(
        self,
        connect: Callable[[str], Session],
        workers: Workers,
        named: Mapping[str, str],
        registry: Registry | None = None,
        model: str = "",
    ) -> None:
        self._connect = connect
        self._workers = workers
        self._named = dict(named)
        self._registry = registry
        self._model = model
        self._open: dict[Place, _Open] = {}
        self._fingerprint: Fingerprint | None = None
        self._said: set[WorkerId] = set()

    @property
    def names(self) -> list[str]:
        """Of all workers that there should be."""
        return sorted({*self._named, *(name for name, _ in self._open)})

    @property
    def sessions(self) -> dict[str, Session]:
        """By the name of the worker; those that are up go before those that are not."""
        found = sorted(self._open.items(), key=lambda item: item[1].session.worker is not None)
        return {name: opened.session for (name, _), opened in found}

    @property
    def starting(self) -> list[WorkerRecord]:
        """Workers that are announced, and cannot be used yet."""
        records = self._records().values()
        return [record for record in records if record.state is WorkerState.STARTING and record.model == self._model]

    async def run(self) -> None:
        """Until it is cancelled; every session is closed then."""
        try:
            for place in self._named.items():
                self._begin(place)
            while True:
                await self.look()
                await self._until_news()
        finally:
            await self._end(list(self._open))

    async def look(self) -> None:
        """Open and close what the last snapshot and the sessions themselves ask for."""
        wanted = self._wanted()
        drained = [record.worker for record in self._records().values() if record.state is WorkerState.DRAINING]
        self._workers.set_draining(frozenset(drained))
        fixed = set(self._named.items())
        await self._end(
            [
                place
                for place, opened in self._open.items()
                if place not in wanted and place not in fixed and not self._is_up(opened.session)
            ]
        )
        there = {opened.session.worker for opened in self._open.values()}
        for place, record in wanted.items():
            if place not in self._open and record.worker not in there:
                self._begin(place)

    async def until_serving(self) -> None:
        """Return when every named worker is up, and what a request needs, wherever it comes from."""
        while not self._is_serving():
            await self._workers.changed()

    # --- for the front -----------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """For a survey of the paths: who is up."""
        sessions = {opened.session.worker: opened.session for opened in self._open.values()}
        infos = [info for info, _ in self._workers.infos()]
        return [(info, sessions[info.worker]) for info in infos if info.worker in sessions]

    async def health(self) -> None:
        """Through the engine's loop of a worker of each role that a request needs. Raises NoCapacity."""
        members = self.members()
        answers = await asyncio.gather(*(self._alive(info) for info, _ in members))
        roles = {info.role for (info, _), alive in zip(members, answers, strict=True) if alive}
        if not _suffice(roles):
            troubles = [f"{record.worker.name} is starting: {record.trouble}" for record in self.starting]
            said = "; ".join(["no engine of some role answers", *(t for t in troubles if not t.endswith(": "))])
            raise NoCapacity(said, retry_after_s=1.0)

    async def _alive(self, info: WorkerInfo) -> bool:
        session = next((o.session for o in self._open.values() if o.session.worker == info.worker), None)
        if session is None:
            return False
        (answer,) = await asyncio.gather(session.health(), return_exceptions=True)
        return not isinstance(answer, BaseException)

    async def metrics(self) -> list[str]:
        """One page of each worker."""
        pages = await asyncio.gather(*(session.metrics() for session in self.sessions.values()))
        return [page.decode() for page in pages]

    # --- inside ------------------------------------------------------------------------------------------------

    def _records(self) -> Mapping[str, WorkerRecord]:
        return {} if self._registry is None else self._registry.snapshot.records

    def _wanted(self) -> dict[Place, WorkerRecord]:
        """At most MAX_WORKERS, whoever is named first by the alphabet."""
        usable = (WorkerState.READY, WorkerState.DRAINING)
        records = [record for record in self._records().values() if record.worker.name not in self._named]
        ours = self._ours(records)
        self._say(records, ours)
        found = sorted((record for record in ours if record.state in usable), key=lambda record: record.worker.name)
        if len(found) > MAX_WORKERS - len(self._named):
            log.warning("%d workers are announced; %d are used at most", len(found), MAX_WORKERS)
        return {(r.worker.name, r.endpoint): r for r in found[: max(0, MAX_WORKERS - len(self._named))]}

    def _ours(self, records: Sequence[WorkerRecord]) -> list[WorkerRecord]:
        """Of one model and one page layout: that of the workers that are up, else that of the most that are ready."""
        model = [record for record in records if record.model == self._model]
        up = {(info.identity, info.layout) for info, _ in self._workers.infos()}
        if self._fingerprint not in up:
            ready = [_fingerprint(record) for record in model if record.state is WorkerState.READY]
            counts = Counter(up or ready)
            self._fingerprint = max(counts, key=lambda found: (counts[found], found), default=None)
        return [record for record in model if _fingerprint(record) == self._fingerprint]

    def _say(self, records: Sequence[WorkerRecord], ours: Sequence[WorkerRecord]) -> None:
        """Once of each: a worker that is there and is not used is a surprise."""
        used = {record.worker for record in ours}
        ignored = {record.worker for record in records if record.state is not WorkerState.STARTING} - used
        for worker in ignored - self._said:
            log.warning("%s is announced with another model or page layout, and is not used", worker)
        self._said = ignored

    def _is_up(self, session: Session) -> bool:
        return session.worker is not None and self._workers.knows(session.worker)

    def _is_serving(self) -> bool:
        infos = [info for info, _ in self._workers.infos()]
        missing = set(self._named) - {info.worker.name for info in infos}
        return not missing and (self._registry is None or _suffice({info.role for info in infos}))

    def _begin(self, place: Place) -> None:
        session = self._connect(place[1])
        self._open[place] = _Open(session, asyncio.create_task(session.run(), name=f"session with {place[0]}"))

    async def _end(self, places: Sequence[Place]) -> None:
        running = [self._open.pop(place).running for place in places]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _until_news(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                await (asyncio.Event().wait() if self._registry is None else self._registry.changed())
        except TimeoutError:
            pass


def _fingerprint(record: WorkerRecord) -> Fingerprint:
    return record.info.identity, record.info.layout


def _suffice(roles: set[Role]) -> bool:
    return Role.AGGREGATED in roles or roles >= NEEDED
