"""Two hosts whose workers and routers know each other by Redis alone: the links and Redis go bad under load.

No wrong token. Every request ends with an answer or with one clear error, in time. Each host goes on with what it
reaches. And some seconds after the fault is over everything is as it was.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.far_fleet import WORKERS, FarFleet, FarRedis, far_fleet
from tests.chaos.netns import LINKS, Hosts, two_hosts
from tests.chaos.table import Row, Table
from tests.chaos.transports import skip_without_ucx
from tests.processes.answers import Answer, ask, assert_right, assert_right_or_refused, body, some_tokens
from tests.processes.cluster import PAGES
from tests.processes.test_registry import metric

BODIES = [body(some_tokens(230, 40), 40), body(some_tokens(231, 300), 12), body(some_tokens(232, 60), 20, n=2)]
ENDS_S = 45.0  # the longest that any request may take, however many others share the machine
RECOVERS_S = 30.0
LEASES_S = 8.0  # after so long each side has given up the other one's workers
CLIENTS = 2  # for each router
WHERE = "between two network namespaces, workers and routers known by Redis alone"


@dataclass
class Rig:
    hosts: Hosts
    fleet: FarFleet
    redis: FarRedis


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    skip_without_ucx()
    with two_hosts() as hosts, far_fleet(hosts) as (fleet, redis):
        yield Rig(hosts, fleet, redis)


@pytest.fixture(scope="module")
def right(rig: Rig) -> list[Answer]:
    async def asked() -> list[Answer]:
        async with httpx.AsyncClient(base_url=rig.fleet.urls[0]) as client:
            return [await ask(client, request, Answer()) for request in BODIES]

    answers = asyncio.run(asked())
    assert all(answer.error is None for answer in answers), answers
    return answers


@dataclass
class Load:
    """Clients of each router, each with one request after the other. `ends`: (router, when, whether answered)."""

    urls: list[str]
    right: list[Answer]
    ends: list[tuple[int, float, bool]] = field(default_factory=list)
    over: bool = False

    async def client(self, which: int, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.urls[which]) as client:
            turn = number
            while not self.over:
                turn += 1
                kind = turn % len(BODIES)
                salted = {**BODIES[kind], "cache_salt": f"{which} {number} {time.monotonic()}"}
                async with asyncio.timeout(ENDS_S):
                    answer = await ask(client, salted, Answer())
                assert_right_or_refused(answer, self.right[kind])
                self.ends.append((which, time.monotonic(), answer.error is None))
                await asyncio.sleep(0.05 if answer.error is None else 0.3)

    def answered_since(self, at_s: float) -> set[int]:
        """Routers that have answered something well."""
        return {which for which, ended_s, is_well in self.ends if is_well and ended_s >= at_s}

    async def both_answer(self, within_s: float, what: str) -> None:
        began_s = time.monotonic()
        while self.answered_since(began_s) != {0, 1}:
            assert time.monotonic() - began_s < within_s, (what, self.answered_since(began_s))
            await asyncio.sleep(0.05)

    def count(self, row: Row) -> None:
        row.runs += len(self.ends)
        row.survived += sum(is_well for _, _, is_well in self.ends)
        row.lost += sum(not is_well for _, _, is_well in self.ends)


@asynccontextmanager
async def load(rig: Rig, right: list[Answer], row: Row) -> AsyncIterator[Load]:
    """In the end every request has ended as it must."""
    made = Load(rig.fleet.urls, right)
    tasks = [asyncio.create_task(made.client(w, n)) for w in range(2) for n in range(CLIENTS)]
    try:
        yield made
        made.over = True
        await asyncio.gather(*tasks)
        made.count(row)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def is_well_again(rig: Rig, right: list[Answer], row: Row) -> None:
    """Both routers hear Redis, see every worker ready and answer every kind of request."""
    began_s = time.monotonic()
    fleet = rig.fleet

    def is_whole() -> bool:
        return all(fleet.ready(url) == WORKERS and metric(url, "baton:registry_up") == 1.0 for url in fleet.urls)

    await asyncio.to_thread(fleet.until, "every worker and Redis are seen by both routers", is_whole, RECOVERS_S)
    for url in fleet.urls:
        async with httpx.AsyncClient(base_url=url) as client:
            for kind, request in enumerate(BODIES):
                answer = await ask(client, {**request, "cache_salt": f"well {time.monotonic()}"}, Answer())
                assert_right(answer, right[kind])
    row.recovered_s.append(time.monotonic() - began_s)
    assert row.recovered_s[-1] < RECOVERS_S


async def is_at_rest(rig: Rig) -> None:
    """Nothing is under way, and every page of every worker is free or cached."""

    def pages() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        text = httpx.get(f"{rig.fleet.urls[0]}/metrics", timeout=10).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "baton:pages":
                    found.setdefault(sample.labels["engine"], {})[sample.labels["state"]] = sample.value
        return found

    def at_rest() -> bool:
        by_worker = pages()
        held = (states[name] for states in by_worker.values() for name in ("owned", "leased", "quarantined"))
        return set(by_worker) == WORKERS and not any(held)

    await asyncio.to_thread(rig.fleet.until, "no page is held by anything", at_rest)
    assert {sum(states.values()) for states in pages().values()} == {PAGES - 1}, "all but the scratch page"


def is_crossing(rig: Rig) -> bool:
    """Some request is under way on a pair of which each host has one half."""
    pairs = [pair for url in rig.fleet.urls for pair in rig.fleet.view(url).get("handoffs", ())]
    return any(pair["requests"] and pair["source"][-1] != pair["receiver"][-1] for pair in pairs)


# --- links ---------------------------------------------------------------------------------------------------


def cut(hosts: Hosts, *links: str) -> None:
    """What each host sends to the other vanishes; what it sends to itself goes on."""
    for host in (hosts.p, hosts.d):
        hosts.mute(host, *links)


def each_sees_its_own(rig: Rig) -> bool:
    own = [{name for name in WORKERS if name.endswith(host)} for host in ("-p", "-d")]
    return [rig.fleet.ready(url) for url in rig.fleet.urls] == own


def one_has_no_registry(rig: Rig) -> bool:
    return [metric(url, "baton:registry_up") for url in rig.fleet.urls] == [0.0, 1.0]


Harm, Felt = Callable[[Hosts], None], Callable[[Rig], bool]

LINK_FAULTS: dict[str, tuple[Harm, Felt]] = {  # and how a router shows that it is felt
    "every link between two hosts cut": (lambda hosts: cut(hosts, *LINKS), each_sees_its_own),
    "the link of requests and pages cut": (lambda hosts: cut(hosts, "data"), each_sees_its_own),
    "the link to Redis cut": (lambda hosts: cut(hosts, "control"), one_has_no_registry),
    "every link throttled to 2 Mbit/s": (lambda hosts: hosts.throttle("2mbit", *LINKS), lambda rig: True),
}
QUICK = {"every link between two hosts cut", "every link throttled to 2 Mbit/s"}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", LINK_FAULTS)
async def test_each_host_goes_on_with_what_it_reaches(
    rig: Rig, right: list[Answer], table: Table, chaos_full: bool, fault: str
) -> None:
    if not chaos_full and fault not in QUICK:
        pytest.skip("only with --chaos-full")
    row = table.row(fault, WHERE)
    harm, felt = LINK_FAULTS[fault]
    async with load(rig, right, row) as under:
        await under.both_answer(ENDS_S, "before the fault")
        await asyncio.to_thread(rig.fleet.until, "a request needs both hosts", lambda: is_crossing(rig))
        try:
            await asyncio.to_thread(harm, rig.hosts)
            await asyncio.sleep(LEASES_S)
            await asyncio.to_thread(rig.fleet.until, "the fault is felt", lambda: felt(rig))
            await under.both_answer(ENDS_S, "while the fault holds")
        finally:
            await asyncio.to_thread(rig.hosts.heal)
        await is_well_again(rig, right, row)
    await is_at_rest(rig)


# --- Redis ---------------------------------------------------------------------------------------------------


async def spoil(redis: FarRedis, how: str, copy: Path) -> None:
    if how == "stopped":
        redis.signal(signal.SIGSTOP)
    elif how == "flushed":
        redis.ask("FLUSHALL")
    else:
        await asyncio.to_thread(redis.stop)
    if how == "replaced by an old copy":
        shutil.copy(copy, redis.folder / "dump.rdb")
        await asyncio.to_thread(redis.start)


async def mend(redis: FarRedis, how: str) -> None:
    if how == "stopped":
        redis.signal(signal.SIGCONT)
    elif how == "killed":
        await asyncio.to_thread(redis.start)
    (redis.folder / "dump.rdb").unlink(missing_ok=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["killed", "stopped", "flushed", "replaced by an old copy"])
async def test_whatever_redis_does_both_hosts_serve_on(
    rig: Rig, right: list[Answer], table: Table, tmp_path: Path, how: str
) -> None:
    """Redis is not on the way of any request: there is no error to be excused."""
    row = table.row(f"Redis {how}", WHERE)
    rig.redis.ask("SAVE")
    shutil.move(rig.redis.folder / "dump.rdb", tmp_path / "old.rdb")
    async with load(rig, right, row) as under:
        await under.both_answer(ENDS_S, "before the fault")
        await spoil(rig.redis, how, tmp_path / "old.rdb")
        try:
            await asyncio.sleep(3.0)
            await under.both_answer(ENDS_S, "while the fault holds")
        finally:
            await mend(rig.redis, how)
        await is_well_again(rig, right, row)
    assert row.lost == 0 and row.survived > 0
    await is_at_rest(rig)
