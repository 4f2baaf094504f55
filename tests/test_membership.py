"""When a worker says that it is ready: after a page has come from a peer, and not never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest

from baton.membership import Membership
from baton.registry_link import RegistryLink, labels_of
from baton.self_test import SelfTest
from baton.worker import _report_end
from baton.worker_server import reached_at
from core.errors import ConfigError
from core.messages import PathReport, Peer, Role, WorkerId, WorkerInfo
from core.registry.breaker import GuardedStore
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.records import WorkerRecord, WorkerState
from core.registry.registry import Registry
from tests.simulation.virtual_time import run


def info(name: str = "d0", role: Role = Role.DECODE, incarnation: int = 1) -> WorkerInfo:
    return WorkerInfo(WorkerId(name, incarnation), role, "identity", "layout", 16, 100, 4096, f"{name}:1")


def record(name: str, role: Role, state: WorkerState = WorkerState.READY) -> WorkerRecord:
    return WorkerRecord(info(name, role), f"{name}:1", state)


class Ways:
    """What becomes of a proof, by the peer's name: a transport, '' for a path that fails, None for no answer."""

    def __init__(self, **ways: str | None) -> None:
        self.ways = ways
        self.asked: list[str] = []

    async def __call__(self, peer: Peer) -> PathReport | None:
        self.asked.append(peer.worker.name)
        await asyncio.sleep(0.1)
        way = self.ways.get(peer.worker.name)
        return None if way is None else PathReport(peer.worker, way, "", 1.0, 0.0, 0.0, "" if way else "cut off")


@pytest.mark.parametrize(
    "ways, passed, why",
    [
        ({"p0": "shm"}, True, "shm"),
        ({"p0": "", "p1": "ucx"}, True, "ucx"),
        ({"p0": None}, True, "no peer answers"),
        ({"p0": "", "p1": None}, False, "cut off"),
        ({"p0": "", "p1": ""}, False, "p1: cut off"),
        ({}, True, "no peer"),
    ],
)
async def test_a_path_from_one_peer_is_enough_and_silence_is_no_failure(
    ways: dict[str, str | None], passed: bool, why: str
) -> None:
    records = {name: record(name, Role.PREFILL) for name in ways}
    verdict = await SelfTest(info(), Ways(**ways), Random(1))(records)
    assert verdict.passed is passed and why in verdict.why


async def test_only_peers_that_could_hand_over_are_tried_and_few_of_them() -> None:
    records = {f"p{n}": record(f"p{n}", Role.PREFILL, WorkerState.STARTING) for n in range(9)}
    records |= {"d1": record("d1", Role.DECODE), "gone": record("gone", Role.PREFILL, WorkerState.DRAINING)}
    other = record("other", Role.PREFILL)
    records["other"] = replace(other, info=replace(other.info, identity="another model"))
    records["serves"] = record("serves", Role.PREFILL)
    ways = Ways()
    assert (await SelfTest(info(), ways, Random(1))(records)).passed
    assert ways.asked[0] == "serves" and len(ways.asked) == 3
    assert not {"d1", "gone", "other"} & set(ways.asked)


@asynccontextmanager
async def registry_on(shelf: MemoryShelf) -> AsyncIterator[RegistryLink]:
    clock = asyncio.get_running_loop().time
    store = GuardedStore(MemoryStore(shelf), clock)
    link = RegistryLink(store, Registry(store, clock, Random(2)))
    running = asyncio.create_task(link.registry.run())
    yield link
    running.cancel()
    await asyncio.wait([running])


async def joined(shelf: MemoryShelf, ways: Ways) -> tuple[Membership, asyncio.Task[None], asyncio.Event]:
    """A decode worker that keeps its record; the event says when it calls itself ready."""
    clock = asyncio.get_running_loop().time
    store = GuardedStore(MemoryStore(shelf), clock)
    membership = Membership(RegistryLink(store, Registry(store, clock, Random(1))), info(), "d0:1")
    ready = asyncio.Event()
    return membership, asyncio.create_task(membership.keep(SelfTest(info(), ways, Random(1)), ready.set)), ready


async def left(membership: Membership, keeping: asyncio.Task[None]) -> None:
    keeping.cancel()
    await asyncio.wait([keeping])
    await membership.withdraw()


def test_a_worker_without_a_path_stays_starting_and_says_why_until_it_has_one() -> None:
    async def main() -> None:
        shelf = MemoryShelf(asyncio.get_running_loop().time)
        async with registry_on(shelf) as other:
            other.registry.announce(record("p0", Role.PREFILL))
            await asyncio.sleep(1)
            ways = Ways(p0="")
            membership, keeping, ready = await joined(shelf, ways)
            await asyncio.sleep(10)
            said = other.registry.snapshot.records["d0"]
            assert said.state is WorkerState.STARTING and "cut off" in said.trouble and not ready.is_set()
            assert len(ways.asked) > 2, "it tries again"
            ways.ways["p0"] = "shm"
            await asyncio.sleep(10)
            said = other.registry.snapshot.records["d0"]
            assert said.state is WorkerState.READY and not said.trouble and ready.is_set()
            membership.announce(WorkerState.DRAINING)
            membership.announce(WorkerState.READY)
            await asyncio.sleep(1)
            assert other.registry.snapshot.records["d0"].state is WorkerState.DRAINING
            await left(membership, keeping)
            await asyncio.sleep(2)
            assert set(other.registry.snapshot.records) == {"p0"}

    run(main())


def test_a_worker_that_begins_to_drain_while_it_tests_does_not_become_ready() -> None:
    async def main() -> None:
        shelf = MemoryShelf(asyncio.get_running_loop().time)
        async with registry_on(shelf) as other:
            other.registry.announce(record("p0", Role.PREFILL))
            await asyncio.sleep(1)
            membership, keeping, ready = await joined(shelf, Ways(p0="shm"))
            await asyncio.sleep(0.01)
            membership.announce(WorkerState.DRAINING)
            await asyncio.sleep(5)
            assert other.registry.snapshot.records["d0"].state is membership.state is WorkerState.DRAINING
            assert not ready.is_set()
            await left(membership, keeping)

    run(main())


def test_with_the_registry_away_a_worker_serves_and_is_announced_when_it_comes_back() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        shelf = MemoryShelf(loop.time)
        shelf.away = True
        began_s = loop.time()
        membership, keeping, ready = await joined(shelf, Ways())
        await ready.wait()
        assert loop.time() - began_s < 3 and membership.state is WorkerState.READY
        shelf.away = False
        async with registry_on(shelf) as other:
            await asyncio.sleep(10)
            assert other.registry.snapshot.records["d0"].state is WorkerState.READY
        await left(membership, keeping)

    run(main())


def test_without_a_registry_a_worker_is_ready_at_once() -> None:
    async def main() -> None:
        ready = asyncio.Event()
        membership = Membership(None, info(), "d0:1")
        keeping = asyncio.create_task(membership.keep(SelfTest(info(), Ways(), Random(1)), ready.set))
        await asyncio.wait_for(ready.wait(), 0.1)
        await left(membership, keeping)

    run(main())


def test_labels_are_names_with_values() -> None:
    assert labels_of("") == {} and labels_of("zone=a,rack=") == {"zone": "a", "rack": ""}
    for wrong in ("zone", "=a", "zone=a,,", "zone=" + "a" * 200, ",".join(f"l{n}=1" for n in range(17))):
        with pytest.raises(ConfigError):
            labels_of(wrong)


def test_an_advertised_port_0_is_the_one_that_was_free() -> None:
    assert reached_at("", "127.0.0.1:5") == "127.0.0.1:5" and reached_at("10.0.0.1:7", "0.0.0.0:5") == "10.0.0.1:7"
    assert reached_at("10.0.0.1:0", "0.0.0.0:51234") == "10.0.0.1:51234"


async def test_whichever_loop_of_a_worker_ends_is_named_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise KeyError("a mistake of ours")

    loops = [asyncio.create_task(asyncio.sleep(60.0), name=name) for name in ("engine", "sweep")]
    loops += [asyncio.create_task(fails(), name="membership")]
    loops[1].cancel()
    await asyncio.wait(loops[1:])
    assert _report_end(*loops) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the loop of the sweep has ended", "the loop of the membership has ended"]
    assert "a mistake of ours" in caplog.text
    loops[0].cancel()
