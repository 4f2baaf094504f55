"""Routers, prefill and decode workers over the hash-chain engine, joined by the worst links there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from baton.composition import Limits, Machine, Model, Worker
from baton.drain import Drain
from core.layout import PageLayout
from core.messages import Role, WorkerId, WorkerInfo
from core.sampling import SamplingParams
from core.security.tickets import Tickets
from engine.batch import Batch, Executor, RowResult
from engine.hashchain import LAYOUT, HashChainExecutor
from kvtransfer.digest import XXH3_64, algorithm
from kvtransfer.frames import Frames
from kvtransfer.memory import CALM, MemoryFabric, MemoryTransport, Mischief
from kvtransfer.session_memory import MemoryNetwork, Weather
from router.choose import Terms
from router.generation import GenerationRequest, Step
from router.saga import Saga
from router.workers import Workers
from session.desk import Desk
from session.feed import Feed
from tests.simulation.gates import Node, Parting, ReceiverGate, SessionsGate, SourceGate, TransportGate
from tests.simulation.router import SimRouter

VOCABULARY = 997
POISON = VOCABULARY - 1  # a prompt that begins with it kills every worker that computes it
FORGOTTEN_S = 7.5  # a dead router's requests are: five seconds, a sweep each second, and what a step takes
FEED_S = 0.1  # a worker that does something looks for news so often
IDLE_FEED_S = 0.25  # and one that does nothing


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What the workers run: the hash chain, or a real model in torch."""

    model: Model
    layout: PageLayout
    executor: Callable[[memoryview], Executor]


HASH_CHAIN = EngineKind(
    Model("hash-chain", VOCABULARY, 2048, ()), LAYOUT, lambda frames: HashChainExecutor(frames, VOCABULARY)
)


class SimWorker:
    """One worker, its ends of every session, and its death."""

    def __init__(self, cluster: SimCluster, name: str, role: Role, incarnation: int) -> None:
        self.cluster = cluster
        self.id = WorkerId(name, incarnation)
        self.node = Node(self.id, cluster.parting, cluster.random.uniform(0.0, 1e5))
        self._tasks: list[asyncio.Task[Any]] = []
        self._feeds: dict[Any, Feed] = {}  # by session
        self._role = role

    @property
    def dead(self) -> bool:
        return self.node.dead

    async def start(self) -> None:
        cluster, node = self.cluster, self.node
        kind = cluster.engine
        self.frames = Frames.anonymous(kind.layout, cluster.pages)
        transport = TransportGate(MemoryTransport(self.id, cluster.fabric), node, cluster.serves_pages)
        await transport.serve(self.frames, algorithm(XXH3_64))
        machine = Machine(
            executor=kind.executor(self.frames.buffer),
            frames=self.frames,
            transport=transport,
            clock=node.clock,
            random=Random(cluster.random.random()),
            run_blocking=self._step,
            offload=self._offload,
            tickets=cluster.tickets,
        )
        self.info = WorkerInfo(
            worker=self.id,
            role=self._role,
            identity=kind.model.identity,
            layout=kind.layout.digest(),
            page_size=kind.layout.page_size,
            pages_total=cluster.pages,
            max_context_tokens=kind.model.max_context_tokens,
            handoff_endpoint=self.id.name,
        )
        self.worker = Worker(self.info, kind.model, cluster.limits, machine, "sim")
        self._join_peers()
        self._watch_pages()
        tier = self.worker.tier
        tier.sweep = node.skip(tier.sweep)  # type: ignore[method-assign]
        self._tasks.append(self.worker.start())
        self.desk = Desk(tier, self.worker.outlet)
        tier.published = self.publish
        self._tasks.append(asyncio.create_task(self._look_around(), name=f"{self.id} looks around"))

    def _join_peers(self) -> None:
        source, receiver = self.worker.source, self.worker.receiver
        network, node = self.cluster.network, self.node
        if source is not None:
            source.tick = node.skip(source.tick)  # type: ignore[method-assign]
            node.on_wake.append(lambda: source.tick())
            source.start(SessionsGate(network.add_source(SourceGate(source, node)), node))  # type: ignore[arg-type]
        if receiver is not None:
            receiver.tick = node.skip(receiver.tick)  # type: ignore[method-assign]
            node.on_wake.append(lambda: receiver.tick())
            gate = ReceiverGate(receiver, node)
            receiver.start(SessionsGate(network.add_receiver(self.id.name, gate), node))  # type: ignore[arg-type]

    def _watch_pages(self) -> None:
        """No page is given out that a late byte may still hit."""
        pool = self.worker.pool
        allocate = pool.allocate

        def watched(count: int) -> list[int] | None:
            taken = allocate(count)
            haunted = self.cluster.fabric.touched(self.id).intersection(taken or ())
            if haunted:
                self.cluster.violations.append(f"I3: {self.id} gave out {haunted}, which may still be written into")
            return taken

        pool.allocate = watched  # type: ignore[method-assign]

    # --- its sessions with routers -----------------------------------------------------------------------------

    def add_feed(self, session: Any) -> Feed:
        self.publish()
        feed = self._feeds[session] = Feed(self.worker.tier.page_snapshot(), self.node.clock)
        return feed

    def drop_feed(self, session: Any) -> None:
        self._feeds.pop(session, None)

    def publish(self) -> None:
        change = self.worker.tier.page_changes()
        if change is not None:
            for feed in self._feeds.values():
                feed.changed(change)

    async def _look_around(self) -> None:
        """What the worker's process does beside its engine: the desk's sweep, and news for its routers."""
        swept_s = 0.0
        while True:
            await asyncio.sleep(FEED_S if self.busy else IDLE_FEED_S)
            if self.node.stopped:
                continue
            now_s = self.node.clock()
            if now_s - swept_s >= 1.0:
                swept_s = now_s
                self.desk.sweep()
            self._say_news()

    def _say_news(self) -> None:
        tier = self.worker.tier
        for session, feed in list(self._feeds.items()):
            if feed.overflowed:
                feed.replace(tier.page_snapshot())
            for event in feed.due(tier.load()):
                take = session._link.take_event
                session.up(lambda take=take, feed=feed, event=event: take(feed, self.id, event))

    # --- its engine --------------------------------------------------------------------------------------------

    async def _step(self, call: Callable[[Batch], list[RowResult]], batch: Batch) -> list[RowResult]:
        """A step takes time by its tokens; the device of a stopped worker stops with it."""
        await asyncio.sleep(self.cluster.step_s * (1.0 + 0.05 * batch.tokens))
        await self._running()
        if any(row.start == 0 and row.ids[0] == POISON for row in batch.rows):
            self.cluster.poisoned.append(self.id)
            self.cluster.spawn(self.cluster.crash(self.id.name, 1.0))
            await asyncio.Event().wait()
        return call(batch)

    async def _offload(self, call: Callable[[], Any]) -> Any:
        await self._running()
        return call()

    async def _running(self) -> None:
        if self.node.stopped:
            await self.node.awake()

    @property
    def busy(self) -> bool:
        ends = (self.worker.source, self.worker.receiver)
        return not self.worker.engine.is_idle or any(end is not None and not end.idle for end in ends)

    # --- its end -----------------------------------------------------------------------------------------------

    async def kill(self) -> None:
        """SIGKILL: nothing of it runs any more; what it was sending goes on arriving."""
        if self.dead:
            return
        self.node.die()
        self.cluster.fabric.kill(self.id)
        self.cluster.network.kill(self.id)
        for router in self.cluster.routers:
            link = router.links.get(self.id.name)
            if link is not None and link.session is not None and link.session.worker is self:
                link.cut()
        await self._end()

    async def close(self) -> None:
        """An orderly end, for the check of what is left."""
        self.node.die()
        await self._end()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.worker.stop()

    # --- what is held ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any moment: every page is where its holders say, and none is reusable that a late byte may hit."""
        pool = self.worker.pool
        pool.check()
        reusable = {page for page in self.cluster.fabric.touched(self.id) if pool.state(page) == "free"}
        assert not reusable & set(pool._free), f"{self.id}: {reusable} may still be written into"

    def leaks(self) -> list[str]:
        """What is held though nothing runs."""
        pool = self.worker.pool
        held = {state: count for state, count in pool.counts().items() if count and state not in ("free", "cached")}
        found = [f"{self.id}: {count} pages {state}" for state, count in held.items()]
        if not self.worker.engine.is_idle:
            found.append(f"{self.id}: sequences are left: {self.worker.engine.sequences}")
        for end in (self.worker.source, self.worker.receiver):
            if end is not None and not end.idle:
                found.append(f"{self.id}: hand-offs are left: {end.counts()}")
        if self.worker.outlet.live:
            found.append(f"{self.id}: {self.worker.outlet.live} attempts are held for routers")
        if self.cluster.fabric.touched(self.id):
            found.append(f"{self.id}: pages may still be written into")
        return found


class CountedNetwork(MemoryNetwork):
    """Tells its cluster of every message."""

    def __init__(self, random: Random, weather: Weather | None, sent: Callable[[], None]) -> None:
        super().__init__(random, weather)
        self._sent = sent

    def send(self, *args: Any) -> None:
        self._sent()
        super().send(*args)


class SimCluster:
    """Made and used under a virtual loop."""

    def __init__(
        self,
        seed: int,
        *,
        routers: int = 1,
        prefill: int = 2,
        decode: int = 2,
        aggregated: int = 0,
        pages: int = 120,
        weather: Weather | None = None,
        mischief: Mischief = CALM,
        limits: Limits | None = None,
        local_prefill_tokens: int = 32,
        engine: EngineKind | None = None,
        two_sided: bool = False,
        step_s: float = 0.002,
        terms: Terms | None = None,
    ) -> None:
        self.random = Random(seed)
        self.tickets = Tickets([seed.to_bytes(32, "little")])
        self.pages = pages
        self.engine = engine or HASH_CHAIN
        self.limits = limits or Limits(step_tokens=64)
        self.terms = terms or Terms(local_prefill_tokens=local_prefill_tokens)
        self.network = CountedNetwork(Random(seed + 1), weather, self.sent)
        self.fabric = MemoryFabric(Random(seed + 2), mischief)
        self.step_s = step_s
        self.parting = Parting()
        self.parting.on_heal.append(self._release)
        self.messages = 0
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        self.on_message: Callable[[int], None] | None = None  # called with the number of each message
        self.drained: list[str] = []  # how each drain ended
        self.poisoned: list[WorkerId] = []  # workers that a poison request has killed
        self.violations: list[str] = []  # what was seen on the way
        self.alive: dict[str, SimWorker] = {}
        self._link_random = Random(seed + 3)
        self._two_sided = two_sided
        self._incarnation = 0
        self._spawned: set[asyncio.Task[Any]] = set()
        self._roles = {f"prefill-{i}": Role.PREFILL for i in range(prefill)}
        self._roles |= {f"decode-{i}": Role.DECODE for i in range(decode)}
        self._roles |= {f"worker-{i}": Role.AGGREGATED for i in range(aggregated)}
        self.all_routers: list[SimRouter] = []  # the dead ones too
        self.routers = [self._new_router(f"router-{i}") for i in range(routers)]

    @property
    def saga(self) -> Saga:
        return self.routers[0].saga

    @property
    def workers(self) -> Workers:
        return self.routers[0].workers

    @property
    def names(self) -> list[str]:
        return list(self._roles)

    async def start(self) -> None:
        """Returns when every router knows every worker."""
        for name in self._roles:
            await self.start_worker(name)
        while any(len(router.workers.infos()) < len(self._roles) for router in self.routers):
            await asyncio.sleep(0.001)

    async def start_worker(self, name: str) -> SimWorker:
        self._incarnation += 1
        worker = SimWorker(self, name, self._roles[name], self._incarnation)
        await worker.start()
        self.alive[name] = worker
        for router in self.routers:
            router.link_to(name)
        return worker

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """A fault's own task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._spawned.add(task)
        return task

    # --- faults ------------------------------------------------------------------------------------------------

    async def crash(self, name: str, restart_s: float | None = 2.0) -> None:
        """Kill a worker; the launcher starts it again."""
        worker = self.alive[name]
        if worker.dead:
            return
        await worker.kill()
        if restart_s is not None:
            await asyncio.sleep(restart_s)
            await self.start_worker(name)

    async def drain(self, name: str, drain_s: float = 30.0) -> str:
        """Take it out of service as its process does, and start it anew. How its drain ended; 'dead' when it died."""
        worker = self.alive[name]
        drain = asyncio.create_task(Drain(worker.worker, drain_s, lambda: self._has_successor(name)).run())
        while not drain.done() and not worker.dead:
            await asyncio.wait([drain], timeout=0.1)
        drain.cancel()
        await asyncio.wait([drain])
        ended = "dead" if drain.cancelled() else drain.result()
        if not worker.dead:
            self.drained.append(ended)
            await self.crash(name, 0.5)
        return ended

    def _has_successor(self, name: str) -> bool:
        role = self._roles[name]
        others = [w for other, w in self.alive.items() if other != name and self._roles[other] is role]
        return any(not w.dead and not w.worker.tier.draining for w in others)

    async def crash_router(self, index: int, restart_s: float) -> None:
        router = self.routers[index]
        if router.dead:
            return
        await router.kill()
        self.spawn(self._expect_forgotten(router))
        await asyncio.sleep(restart_s)
        self._incarnation += 1
        again = self.routers[index] = self._new_router(f"router-{index}.{self._incarnation}")
        for name in self._roles:
            again.link_to(name)

    async def _expect_forgotten(self, router: SimRouter) -> None:
        """Workers keep a router's requests for some seconds, for a reconnect, and then no longer."""
        loop = asyncio.get_running_loop()
        died_s = loop.time()
        await asyncio.sleep(FORGOTTEN_S)
        for worker in self.alive.values():
            node = worker.node
            undisturbed = not node.dead and not node.stopped and node.disturbed_s < died_s
            reached = not self.parting.touched_since(worker.id.name, died_s)
            held = [key for key, held in worker.worker.outlet._held.items() if held.router == router.name]
            live = [key for key in held if worker.worker.outlet._held[key].ended_s is None]
            if undisturbed and reached and live:
                self.violations.append(f"I3: {worker.id} holds {live} for {router.name}, which is dead")

    def _new_router(self, name: str) -> SimRouter:
        self.all_routers.append(SimRouter(self, name, self.random.uniform(0.0, 1e5)))
        return self.all_routers[-1]

    def _release(self) -> None:
        for router in self.routers:
            for link in router.links.values():
                if link.session is not None and not self.parting.between(router.name, link.name):
                    link.session.release()

    # --- what workers and links ask ----------------------------------------------------------------------------

    def sent(self) -> None:
        self.messages += 1
        for waits in self._waiting.pop(self.messages, ()):
            if not waits.done():
                waits.set_result(None)
        if self.on_message is not None:
            self.on_message(self.messages)

    async def more_messages(self, count: int, patience_s: float = 4.0) -> None:
        """Returns when so many more have been sent, or nothing has come of it."""
        waits = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(self.messages + count, []).append(waits)
        await asyncio.wait([waits], timeout=patience_s)

    def link_delay_s(self) -> float:
        return self._link_random.uniform(0.0, 0.001)

    async def serves_pages(self, peer: WorkerId) -> None:
        """With a two-sided fabric, a stopped source sends nothing."""
        worker = self.alive.get(peer.name)
        if self._two_sided and worker is not None and worker.id == peer and worker.node.stopped:
            try:
                await worker.node.awake()
            except ConnectionError:
                pass  # the fabric says so

    # --- use ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> list[Step]:
        return await self.routers[0].generate(request)

    def check(self, *, busy_only: bool = False) -> None:
        for worker in self.alive.values():
            if not worker.dead and (worker.busy or not busy_only):
                worker.check()

    def leaks(self) -> list[str]:
        """What is held though nothing runs, anywhere."""
        found = [leak for worker in self.alive.values() if not worker.dead for leak in worker.leaks()]
        found += [leak for router in self.routers if not router.dead for leak in router.leaks()]
        living = {worker.id for worker in self.alive.values() if not worker.dead}
        dialled = [pair for pair in self.network._wanted if not set(pair) <= living and pair[0] in living]
        return found + [f"{source} still dials {peer}" for source, peer in dialled]

    async def quiesce(self, patience_s: float = 60.0) -> list[str]:
        """Wait until nothing is held; what is left after that is a leak."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + patience_s
        while (leaks := self.leaks()) and loop.time() < until_s:
            await asyncio.sleep(0.5)
        self.check()
        return leaks

    async def close(self) -> None:
        """Orderly, so that what is left afterwards is a leak."""
        for task in self._spawned:
            task.cancel()  # also in the middle of a crash: the worker is closed below
        await asyncio.gather(*self._spawned, return_exceptions=True)
        for router in self.routers:
            await router.kill()
        for worker in self.alive.values():
            await worker.close()
        await self.network._chores.stop()


def request_of(name: str, prompt: list[int], params: SamplingParams, deadline_s: float = 60.0) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), params, deadline_s)
