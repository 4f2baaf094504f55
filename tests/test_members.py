"""Which sessions a router has, as records come, change and vanish, in virtual time: sessions decide who is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest

from core.errors import NoCapacity, QueueFull, WorkerLost
from core.messages import PathReport, Peer, Role, WorkerId, WorkerInfo
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.quota import Quota
from core.registry.records import WorkerRecord, WorkerState
from core.registry.registry import Registry
from router.admission import Admission, Parts, Slot
from router.limits import Limits
from router.members import Members
from router.workers import Workers
from tests.simulation.virtual_time import run

MODEL = "model"


def info(name: str, incarnation: int = 1, role: Role = Role.DECODE, identity: str = "weights") -> WorkerInfo:
    return WorkerInfo(WorkerId(name, incarnation), role, identity, "layout", 16, 100, 4096, f"{name}:1")


def record(about: WorkerInfo, endpoint: str, state: WorkerState = WorkerState.READY, trouble: str = "") -> WorkerRecord:
    return WorkerRecord(about, endpoint, state, {}, MODEL, trouble)


class Net:
    """Who runs at which endpoint. A session is up while somebody does, and lost a second after that."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.there: dict[str, WorkerInfo] = {}
        self.sessions: list[FakeSession] = []

    def connect(self, endpoint: str) -> FakeSession:
        self.sessions.append(FakeSession(self, endpoint))
        return self.sessions[-1]

    @property
    def open(self) -> list[str]:
        return sorted(session.endpoint for session in self.sessions if session.running)


class FakeSession:
    """A router.members.Session without a wire."""

    def __init__(self, net: Net, endpoint: str) -> None:
        self.net, self.endpoint, self.running = net, endpoint, False
        self.worker: WorkerId | None = None

    async def run(self) -> None:
        self.running = True
        try:
            while True:
                found = self.net.there.get(self.endpoint)
                if found is not None and found.worker != self.worker:
                    self._down()
                    self.worker = found.worker
                    self.net.workers.up(found, self)  # type: ignore[arg-type]
                elif found is None and self.worker is not None:
                    await asyncio.sleep(1.0)
                    self._down()
                await asyncio.sleep(0.1)
        finally:
            self.running = False
            self._down()

    def _down(self) -> None:
        if self.worker is not None:
            self.net.workers.down(self.worker)
            self.worker = None

    async def health(self) -> float:
        if self.endpoint not in self.net.there:
            raise WorkerLost("gone")
        return 0.0

    async def metrics(self) -> bytes:
        return self.endpoint.encode()

    async def paths(self, probe: Peer | None, ticket: bytes) -> Sequence[PathReport]:
        return ()


class Bench:
    """A router's members over a store, and somebody who writes records into it."""

    def __init__(self, named: dict[str, str]) -> None:
        clock = asyncio.get_running_loop().time
        self.shelf = MemoryShelf(clock)
        self.registry = Registry(MemoryStore(self.shelf), clock, Random(1))
        self.author = Registry(MemoryStore(self.shelf), clock, Random(2))
        self.workers = Workers(clock)
        self.net = Net(self.workers)
        self.members = Members(self.net.connect, self.workers, named, self.registry, MODEL)

    def announce(self, about: WorkerInfo, endpoint: str, state: WorkerState = WorkerState.READY) -> None:
        self.net.there[endpoint] = about
        self.author.announce(record(about, endpoint, state))

    @property
    def up(self) -> list[str]:
        return sorted(str(found.worker) for found, _ in self.workers.infos())


@asynccontextmanager
async def bench(**named: str) -> AsyncIterator[Bench]:
    made = Bench(named)
    loops = [asyncio.create_task(loop) for loop in (made.registry.run(), made.author.run(), made.members.run())]
    yield made
    for task in loops:
        task.cancel()
    await asyncio.wait(loops)
    assert made.net.open == [], "sessions end with the router"


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in virtual time."""

    async def main() -> None:
        await test()

    def called() -> None:
        run(main())

    return called


@virtual
async def test_a_worker_is_used_when_it_is_ready_and_no_more_when_it_drains() -> None:
    async with bench() as b:
        b.announce(info("d0"), "d0:1", WorkerState.STARTING)
        await asyncio.sleep(3)
        assert b.net.open == []
        b.announce(info("d0"), "d0:1")
        await asyncio.sleep(1)
        assert b.up == ["d0@1"]
        (candidate,) = b.workers.candidates((1, 2), b"")
        assert not candidate.load.draining
        b.announce(info("d0"), "d0:1", WorkerState.DRAINING)
        await asyncio.sleep(1)
        (candidate,) = b.workers.candidates((1, 2), b"")
        assert candidate.load.draining and b.up == ["d0@1"]
        await b.author.withdraw(WorkerId("d0", 1))
        del b.net.there["d0:1"]
        await asyncio.sleep(5)
        assert b.up == [] and b.net.open == []


@virtual
async def test_a_record_that_lapses_ends_no_session_and_a_lost_session_without_a_record_ends() -> None:
    async with bench() as b:
        b.announce(info("d0"), "d0:1")
        await asyncio.sleep(1)
        await b.author.withdraw(WorkerId("d0", 1))
        await asyncio.sleep(60)
        assert b.up == ["d0@1"] and not b.registry.snapshot.records
        del b.net.there["d0:1"]
        await asyncio.sleep(3)
        assert b.up == [] and b.net.open == []


@virtual
async def test_while_the_store_is_away_a_worker_that_comes_back_is_met_again() -> None:
    async with bench() as b:
        b.announce(info("d0"), "d0:1")
        await asyncio.sleep(1)
        b.shelf.away = True
        del b.net.there["d0:1"]
        await asyncio.sleep(10)
        assert b.up == [] and b.net.open == ["d0:1"], "the last snapshot stands"
        b.net.there["d0:1"] = info("d0", 2)
        await asyncio.sleep(1)
        assert b.up == ["d0@2"]


@virtual
async def test_a_new_incarnation_elsewhere_takes_the_place_of_the_old_one_when_it_is_there() -> None:
    async with bench() as b:
        b.announce(info("d0"), "d0:1")
        await asyncio.sleep(1)
        await b.author.withdraw(WorkerId("d0", 1))
        b.author.announce(record(info("d0", 7), "nowhere:1"))  # an old copy of the store says so
        await asyncio.sleep(5)
        assert b.up == ["d0@1"] and b.net.open == ["d0:1", "nowhere:1"]
        await b.author.withdraw(WorkerId("d0", 7))
        b.announce(info("d0", 2), "d0:2")
        await asyncio.sleep(3)
        assert b.up == ["d0@2"] and b.net.open == ["d0:2"]


@virtual
async def test_workers_of_another_model_and_odd_weights_are_left_alone() -> None:
    async with bench() as b:
        b.author.announce(replace(record(info("x0"), "x0:1"), model="another"))
        for name in ("d0", "d1"):
            b.announce(info(name), f"{name}:1")
        b.announce(info("odd", identity="other weights"), "odd:1")
        await asyncio.sleep(2)
        assert b.up == ["d0@1", "d1@1"] and b.net.open == ["d0:1", "d1:1"]
        for name in ("d0", "d1"):  # one set of weights at a time
            await b.author.withdraw(WorkerId(name, 1))
            del b.net.there[f"{name}:1"]
        await asyncio.sleep(5)
        assert b.up == ["odd@1"]


@virtual
async def test_a_named_worker_needs_no_record_and_has_one_session() -> None:
    async with bench(d0="unix:/d0") as b:
        b.net.there["unix:/d0"] = info("d0")
        b.announce(info("d0"), "elsewhere:1")
        b.announce(info("p0", role=Role.PREFILL), "p0:1")
        await asyncio.wait_for(b.members.until_serving(), 3)
        await asyncio.sleep(3)
        assert b.net.open == ["p0:1", "unix:/d0"] and b.members.names == ["d0", "p0"]
        assert {found.worker.name for found, _ in b.members.members()} == {"d0", "p0"}
        assert sorted(await b.members.metrics()) == ["p0:1", "unix:/d0"]


@virtual
async def test_health_needs_a_living_worker_of_each_role_and_says_who_is_starting() -> None:
    async with bench() as b:
        b.announce(info("d0"), "d0:1")
        b.author.announce(record(info("p0", role=Role.PREFILL), "p0:1", WorkerState.STARTING, "no path works"))
        await asyncio.sleep(2)
        with pytest.raises(NoCapacity) as caught:
            await b.members.health()
        assert "p0 is starting: no path works" in caught.value.message
        b.announce(info("p0", role=Role.PREFILL), "p0:1")
        await asyncio.sleep(2)
        await b.members.health()
        del b.net.there["p0:1"]
        with pytest.raises(NoCapacity):
            await b.members.health()


@virtual
async def test_what_several_routers_admit_adds_up_to_one_limit_at_most() -> None:
    loop, random = asyncio.get_running_loop(), Random(4)
    shelf = MemoryShelf(loop.time)
    quotas = [
        Quota(MemoryStore(shelf), loop.time, Random(n), name="requests", router=f"r{n}", limit=64) for n in range(3)
    ]
    loops = [asyncio.create_task(quota.run()) for quota in quotas]
    await asyncio.sleep(5)  # a router that has just begun admits its start without asking
    fronts = [Admission(Limits(max_requests=64), loop.time, Parts(requests=quota)) for quota in quotas]
    served, refused, most = [0, 0, 0], 0, 0

    async def client(which: int) -> None:
        nonlocal refused, most
        try:
            slot: Slot = await fronts[which].admit(1)
        except QueueFull:
            refused += 1
            return
        with slot:
            total = sum(front.requests for front in fronts)
            assert total <= 64
            most = max(most, total)
            await asyncio.sleep(random.uniform(0.1, 1.0))
            served[which] += 1

    clients = []
    for number in range(3000):
        which = 0 if number < 1500 else random.randrange(3)  # the others come when the first has everything
        clients.append(asyncio.create_task(client(which)))
        await asyncio.sleep(0.005)
    await asyncio.gather(*clients)
    assert most >= 56 and refused and min(served) > 300, (most, refused, served)
    for task in loops:
        task.cancel()
    await asyncio.wait(loops)
