"""One simulated router: its knowledge of the workers, its saga, and a session with each worker like the real one's.

A session breaks and is resumed, is cut after silence, and says after a while that the worker is gone: what
`router.client` and `session.server` do over gRPC, with messages that are delayed, in order, and lost by a break.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.errors import WorkerLost
from core.messages import Cancel, Lend, Submit, TokenBatch, WorkerId
from router.client import SessionTimes
from router.generation import GenerationRequest, Step
from router.saga import NoCounters, Saga
from router.threshold import Threshold
from router.workers import Workers
from session.feed import Feed

if TYPE_CHECKING:
    from tests.simulation.cluster import SimCluster, SimWorker

TIMES = SessionTimes()
KEEPALIVE_S = 15.0  # a worker that hears nothing of a router's end notices it by then


class Attempts(NoCounters):
    """What the saga counts, and what the links carried."""

    def __init__(self) -> None:
        self.offered = 0
        self.retries = 0
        self.replays = 0
        self.reasons: dict[str, int] = {}

    def retried(self, reason: str) -> None:
        self.retries += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def replayed(self) -> None:
        self.replays += 1


class SimRouter:
    """Its clients' tasks die with it."""

    def __init__(self, cluster: SimCluster, name: str, clock_offset_s: float) -> None:
        self.cluster = cluster
        self.name = name
        self.dead = False
        self._offset_s = clock_offset_s
        self._loop = asyncio.get_running_loop()
        self.workers = Workers(self.clock)
        self.counts = Attempts()
        threshold = Threshold(cluster.terms)
        self.saga = Saga(
            self.workers, self.clock, threshold, placement_wait_s=8.0, counters=self.counts, tickets=cluster.tickets
        )
        self.links: dict[str, RouterLink] = {}
        self.clients: set[asyncio.Task[Any]] = set()  # their connections end with it
        self.attempts: dict[str, int] = {}  # of each request, as the links have carried them
        self._tasks: list[asyncio.Task[Any]] = []

    def clock(self) -> float:
        return self._loop.time() + self._offset_s

    def link_to(self, name: str) -> None:
        """Keep a session with whatever runs under this name."""
        if name not in self.links:
            self.links[name] = RouterLink(self, name)
            self._tasks.append(asyncio.create_task(self.links[name].run(), name=f"{self.name} to {name}"))

    async def generate(self, request: GenerationRequest) -> list[Step]:
        return [step async for step in self.saga.generate(request)]

    async def kill(self) -> None:
        """Without a word: its workers see their sessions end."""
        self.dead = True
        tasks = [*self._tasks, *self.clients]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def leaks(self) -> list[str]:
        found = []
        if self.workers._inboxes:
            found.append(f"{self.name}: inboxes are left: {sorted(self.workers._inboxes)}")
        if self.saga._runs:
            found.append(f"{self.name}: requests are left: {sorted(self.saga._runs)}")
        return found


class _Session:
    """One connection, from its Welcome to its break. Messages each way keep their order."""

    def __init__(self, link: RouterLink, worker: SimWorker) -> None:
        self.worker = worker
        self.ended = asyncio.Event()
        self._link = link
        self._router = link.router
        self._cluster = link.router.cluster
        self._loop = asyncio.get_running_loop()
        self._due_s = [0.0, 0.0]
        self._held: tuple[deque[Callable[[], object]], ...] = (deque(), deque())
        self._pump: asyncio.Task[None] | None = None

    def open(self, resume: dict[tuple[str, int], tuple[int, ...]]) -> None:
        self.queue = self.worker.desk.open(self._router.name, resume)
        self.feed = self.worker.add_feed(self)

    def start(self) -> None:
        self._pump = asyncio.create_task(self._send_up(), name="session")

    def down(self, do: Callable[[], object]) -> None:
        self._later(0, lambda: self.worker.node.call(lambda: None if self.ended.is_set() else do()))

    def up(self, do: Callable[[], object]) -> None:
        def arrive() -> None:
            self._link.heard_s = self._loop.time()
            do()

        self._later(1, arrive)

    def end(self) -> None:
        """It breaks: what is under way is lost. The worker's side may not notice before it is told."""
        if self.ended.is_set():
            return
        self.ended.set()
        if self._pump is not None:
            self._pump.cancel()
        self.worker.drop_feed(self)
        pair = (self._router.name, self.worker.id.name)
        if self._cluster.parting.between(*pair):
            self._loop.call_later(KEEPALIVE_S, self._close)
        else:
            self._close()

    def release(self) -> None:
        """A partition has healed: what TCP kept back arrives."""
        for held in self._held:
            while held and not self.ended.is_set():
                held.popleft()()

    def _close(self) -> None:
        self.worker.node.call(lambda: self.worker.desk.close(self._router.name, self.queue))

    async def _send_up(self) -> None:
        while (message := await self.queue.messages.get()) is not None:
            if self.worker.node.stopped:
                await self.worker.node.awake()
            self.up(lambda message=message: self._link.take(self.worker.id, message))  # type: ignore[misc]
        self.up(self.end)

    def _later(self, way: int, do: Callable[[], object]) -> None:
        cluster, loop = self._cluster, self._loop
        cluster.sent()
        due_s = self._due_s[way] = max(loop.time() + cluster.link_delay_s(), self._due_s[way] + 1e-9)
        loop.call_at(due_s, self._arrive, way, do)

    def _arrive(self, way: int, do: Callable[[], object]) -> None:
        if self.ended.is_set():
            return
        if self._held[way] or self._cluster.parting.between(self._router.name, self.worker.id.name):
            self._held[way].append(do)
        else:
            do()


class RouterLink:
    """A router.workers.Link, and its session, again and again."""

    def __init__(self, router: SimRouter, name: str) -> None:
        self.router = router
        self.name = name
        self.heard_s = 0.0
        self.session: _Session | None = None
        self._outbox: deque[Callable[[SimWorker], object]] = deque()
        self._worker: WorkerId | None = None  # while it counts as up
        self._broken_s: float | None = None
        self._loop = asyncio.get_running_loop()

    def submit(self, submit: Submit) -> None:
        self.router.attempts[submit.request_id] = submit.attempt
        self._put(lambda worker: worker.desk.submit(self.router.name, submit))

    def cancel(self, cancel: Cancel) -> None:
        try:
            self._put(lambda worker: worker.desk.cancel(cancel))
        except WorkerLost:
            pass

    def lend(self, lend: Lend) -> None:
        self._put(lambda worker: worker.desk.lend(lend))

    def _put(self, do: Callable[[SimWorker], object]) -> None:
        if self.router.dead:
            return
        if len(self._outbox) >= TIMES.outbox_messages:
            raise WorkerLost(f"the session with {self._worker} does not take messages")
        self._outbox.append(do)
        self._flush()

    def _flush(self) -> None:
        session = self.session
        while session is not None and not session.ended.is_set() and self._outbox:
            do = self._outbox.popleft()
            session.down(lambda do=do: do(session.worker))  # type: ignore[misc]

    def cut(self) -> None:
        """The session breaks."""
        if self.session is not None:
            self.session.end()

    async def run(self) -> None:
        try:
            while True:
                await self._talk()
                if self._worker is not None:
                    self.router.workers.broken(self._worker)
                now_s = self._loop.time()
                self._broken_s = now_s if self._broken_s is None else self._broken_s
                if now_s - self._broken_s >= TIMES.resume_s:
                    self._down()
                await asyncio.sleep(TIMES.retry_s)
        finally:
            self.cut()

    async def _talk(self) -> None:
        worker = self.router.cluster.alive.get(self.name)
        if worker is None or worker.node.dead:
            return
        try:
            async with asyncio.timeout(TIMES.connect_s):
                session = await self._greet(worker)
        except (TimeoutError, ConnectionError):
            return
        self.session, self._broken_s, self.heard_s = session, None, self._loop.time()
        try:
            self._up(worker)
            session.start()
            self._flush()
            await self._watch(session)
        finally:
            session.end()
            self.session = None

    async def _greet(self, worker: SimWorker) -> _Session:
        """Hello and Welcome. The attempts that run are named as they are when it is said."""
        router, cluster = self.router, self.router.cluster
        await cluster.parting.over(router.name, self.name)
        await worker.node.awake()
        running = [] if self._worker is None else router.workers.running(self._worker)
        resume = {(inbox.request_id, inbox.attempt): tuple(inbox.next_index()) for inbox in running}
        await asyncio.sleep(cluster.link_delay_s())
        await worker.node.awake()
        session = _Session(self, worker)
        session.open(resume)
        try:
            await asyncio.sleep(cluster.link_delay_s())
            await worker.node.awake()
        except BaseException:
            session.end()
            raise
        return session

    async def _watch(self, session: _Session) -> None:
        """Until the session ends. A worker that is silent for too long is down, whatever its sockets say."""
        while not session.ended.is_set():
            left_s = self.heard_s + TIMES.silence_s - self._loop.time()
            if left_s <= 0:
                self._down()
                return
            try:
                async with asyncio.timeout(left_s):
                    await session.ended.wait()
            except TimeoutError:
                continue

    def _up(self, worker: SimWorker) -> None:
        if self._worker is not None and self._worker != worker.id:
            self._down()
        self._worker = worker.id
        self.router.workers.up(worker.info, self)

    def _down(self) -> None:
        """What waits to be sent was meant for that incarnation."""
        if self._worker is not None:
            self.router.workers.down(self._worker)
            self._worker = None
        self._outbox.clear()

    def take(self, worker: WorkerId, message: Any) -> None:
        if worker != self._worker:
            return
        if isinstance(message, TokenBatch):
            self.router.workers.on_batch(worker, message)
        else:
            self.router.workers.on_failed(worker, message)

    def take_event(self, feed: Feed, worker: WorkerId, event: Any) -> None:
        """A gap in the page numbers is answered with a new event stream."""
        if worker != self._worker or self.session is None or self.session.feed is not feed:
            return
        if not hasattr(event, "number"):
            self.router.workers.on_load(worker, event)
        elif not self.router.workers.on_pages(worker, event):
            session = self.session
            session.worker.drop_feed(session)
            session.feed = session.worker.add_feed(session)
