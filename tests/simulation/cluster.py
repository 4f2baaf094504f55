"""A router, prefill and decode workers over the hash-chain engine, joined by the worst links there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from baton.composition import Limits, Machine, Model, Worker
from baton.memory_link import MemoryLink
from core.layout import PageLayout
from core.messages import Role, WorkerId, WorkerInfo
from core.sampling import SamplingParams
from engine.batch import Batch, Executor, RowResult
from engine.hashchain import LAYOUT, HashChainExecutor
from kvtransfer.digest import XXH3_64, algorithm
from kvtransfer.frames import Frames
from kvtransfer.memory import CALM, MemoryFabric, MemoryTransport, Mischief
from kvtransfer.session_memory import MemoryNetwork, Weather
from router.choose import Terms
from router.generation import GenerationRequest, Step
from router.saga import Saga
from router.threshold import Threshold
from router.workers import Workers
from session.desk import Desk

VOCABULARY = 997
NOTICED_S = 1.0  # a killed worker's session is not resumed


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
    """One worker, its link to the router, and its death."""

    def __init__(self, cluster: SimCluster, name: str, role: Role, incarnation: int) -> None:
        self.cluster = cluster
        self.id = WorkerId(name, incarnation)
        self.stopped = asyncio.Event()  # clear while SIGSTOP holds it
        self.stopped.set()
        self.dead = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._role = role

    async def start(self) -> None:
        cluster, loop = self.cluster, asyncio.get_running_loop()
        kind = cluster.engine
        self.frames = Frames.anonymous(kind.layout, cluster.pages)
        transport = MemoryTransport(self.id, cluster.fabric)
        await transport.serve(self.frames, algorithm(XXH3_64))
        machine = Machine(
            executor=kind.executor(self.frames.buffer),
            frames=self.frames,
            transport=transport,
            clock=loop.time,
            random=Random(cluster.random.random()),
            run_blocking=self._step,
            offload=_inline,
        )
        info = WorkerInfo(
            worker=self.id,
            role=self._role,
            identity=kind.model.identity,
            layout=kind.layout.digest(),
            page_size=kind.layout.page_size,
            pages_total=cluster.pages,
            max_context_tokens=kind.model.max_context_tokens,
            handoff_endpoint=self.id.name,
        )
        self.worker = Worker(info, kind.model, cluster.limits, machine, "sim")
        if self.worker.source is not None:
            self.worker.source.start(cluster.network.add_source(self.worker.source))
        if self.worker.receiver is not None:
            self.worker.receiver.start(cluster.network.add_receiver(self.id.name, self.worker.receiver))
        self._tasks.append(self.worker.start())
        self.desk = Desk(self.worker.tier, self.worker.outlet)
        self.link = MemoryLink("router", cluster.workers, self.desk, loop.time, cluster.random)
        self.worker.tier.published = self.link.publish
        self.link.start()

    async def _step(self, call: Callable[[Batch], list[RowResult]], batch: Batch) -> list[RowResult]:
        """A step takes time by its tokens; the device of a stopped worker stops with it."""
        await asyncio.sleep(0.002 + 0.0001 * batch.tokens)
        await self.stopped.wait()
        return call(batch)

    async def kill(self) -> None:
        """SIGKILL: nothing of it runs any more; what it was sending goes on arriving."""
        if self.dead:
            return
        self.dead = True
        self.cluster.fabric.kill(self.id)
        self.cluster.network.kill(self.id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.worker.stop()
        await self.link.kill(NOTICED_S)

    async def close(self) -> None:
        """An orderly end, for the check of what is left."""
        if not self.dead:
            self.dead = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.worker.stop()
            await self.link.stop()

    def leaks(self) -> list[str]:
        """What is held though nothing runs."""
        pool = self.worker.pool
        pool.check()
        held = {state: count for state, count in pool.counts().items() if count and state not in ("free", "cached")}
        found = [f"{self.id}: {count} pages {state}" for state, count in held.items()]
        if not self.worker.engine.is_idle:
            found.append(f"{self.id}: sequences are left: {self.worker.engine.sequences}")
        for end in (self.worker.source, self.worker.receiver):
            if end is not None and not end.idle:
                found.append(f"{self.id}: hand-offs are left: {end.counts()}")
        return found


async def _inline(call: Callable[[], Any]) -> Any:
    return call()


class SimCluster:
    """Made and used under a virtual loop."""

    def __init__(
        self,
        seed: int,
        *,
        prefill: int = 2,
        decode: int = 2,
        aggregated: int = 0,
        pages: int = 120,
        weather: Weather | None = None,
        mischief: Mischief = CALM,
        limits: Limits | None = None,
        local_prefill_tokens: int = 32,
        engine: EngineKind | None = None,
    ) -> None:
        self.random = Random(seed)
        self.pages = pages
        self.engine = engine or HASH_CHAIN
        self.limits = limits or Limits(step_tokens=64)
        self.network = MemoryNetwork(Random(seed + 1), weather)
        self.fabric = MemoryFabric(Random(seed + 2), mischief)
        clock = asyncio.get_running_loop().time
        self.workers = Workers(clock)
        threshold = Threshold(Terms(local_prefill_tokens=local_prefill_tokens))
        self.saga = Saga(self.workers, clock, threshold, placement_wait_s=8.0)
        self._incarnation = 0
        self.alive: dict[str, SimWorker] = {}
        self._roles = {f"prefill-{i}": Role.PREFILL for i in range(prefill)}
        self._roles |= {f"decode-{i}": Role.DECODE for i in range(decode)}
        self._roles |= {f"worker-{i}": Role.AGGREGATED for i in range(aggregated)}

    async def start(self) -> None:
        for name in self._roles:
            await self.start_worker(name)

    async def start_worker(self, name: str) -> SimWorker:
        self._incarnation += 1
        worker = self.alive[name] = SimWorker(self, name, self._roles[name], self._incarnation)
        await worker.start()
        return worker

    async def crash(self, name: str, restart_s: float | None = 2.0) -> None:
        """Kill a worker; the launcher starts it again."""
        await self.alive[name].kill()
        if restart_s is not None:
            await asyncio.sleep(restart_s)
            await self.start_worker(name)

    async def generate(self, request: GenerationRequest) -> list[Step]:
        return [step async for step in self.saga.generate(request)]

    async def quiesce(self, patience_s: float = 60.0) -> list[str]:
        """Wait until nothing is held; what is left after that is a leak."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + patience_s
        while (leaks := [leak for w in self.alive.values() for leak in w.leaks()]) and loop.time() < until_s:
            await asyncio.sleep(0.5)
        return leaks

    async def close(self) -> None:
        for worker in self.alive.values():
            await worker.close()


def request_of(name: str, prompt: list[int], params: SamplingParams, deadline_s: float = 60.0) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), params, deadline_s)
