"""Real workers and routers over a real Redis: they come and go, and Redis may do what it likes, under load."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from core.errors import RegistryAway
from core.messages import Role, WorkerId, WorkerInfo
from core.registry.records import WorkerRecord, WorkerState, decode
from core.registry.registry import GROUP
from tests.processes.answers import Answer, ask, assert_right, body, some_tokens
from tests.processes.cluster import serving
from tests.processes.fleet import Fleet, fleet
from tests.redis_server import RedisServer, redis_server

T = TypeVar("T")

REBUILT_S = 10.0
BODIES = [body(some_tokens(30, 40), 25), body(some_tokens(31, 300), 12), body(some_tokens(32, 60), 20, n=2)]
NOWHERE = "127.0.0.1:9"
LIMIT = 1024  # requests in flight, over all routers


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def two_routers(redis: RedisServer) -> Iterator[Fleet]:
    """One worker of each role, and two routers; every test leaves it as it was."""
    with fleet(redis.url, drain_s=10.0) as made:
        made.worker("prefill-0", "prefill")
        made.worker("decode-0", "decode")
        made.router("one")
        made.router("other")
        made.until_ready("prefill-0", "decode-0")
        yield made


@dataclass
class Traffic:
    """Requests one after the other from several clients, to every router in turn, until it is told to end."""

    urls: list[str]
    references: list[Answer]
    first_s: list[float] = field(default_factory=list)  # until the first token
    answered: int = 0
    over: bool = False

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.urls[number % len(self.urls)]) as client:
            turn = number
            while not self.over:
                which = turn % len(BODIES)
                turn += 1
                answer = Answer()
                salted = {**BODIES[which], "cache_salt": f"{number} {turn} {time.monotonic()}"}
                began_s, asking = time.monotonic(), asyncio.create_task(ask(client, salted, answer))
                while not answer.count and not asking.done():
                    await asyncio.sleep(0.005)
                self.first_s.append(time.monotonic() - began_s)
                await asking
                assert_right(answer, self.references[which])
                self.answered += 1

    async def until_answered(self, more: int) -> list[float]:
        """Wait for so many answers from now on; their times until the first token."""
        began, start = len(self.first_s), self.answered
        async with asyncio.timeout(60):
            while self.answered < start + more:
                await asyncio.sleep(0.05)
        return self.first_s[began:]


@asynccontextmanager
async def traffic(urls: list[str], clients: int = 3) -> AsyncIterator[Traffic]:
    """In the end every request has been answered, and rightly."""
    async with httpx.AsyncClient(base_url=urls[0]) as client:
        references = [await ask(client, request, Answer()) for request in BODIES]
    for reference in references:
        assert reference.error is None, reference.error
    made = Traffic(urls, references)
    running = [asyncio.create_task(made.client(number)) for number in range(clients)]
    try:
        yield made
        made.over = True
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def metric(url: str, name: str) -> float:
    """The first sample of this name; -1: there is none."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.split("{")[0].split()[:1] == [name]), -1.0)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """A busy machine may make a test late for the store: ask again."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except RegistryAway:
                await asyncio.sleep(0.1)


async def in_thread(call: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(call, *args)


# --- workers come and go -------------------------------------------------------------------------------------


async def test_a_worker_that_comes_later_is_used_and_one_that_leaves_loses_no_request(redis: RedisServer) -> None:
    with fleet(redis.url.removesuffix("0") + "1", 10.0) as made:
        made.worker("prefill-0", "prefill")
        made.worker("decode-0", "decode")
        url = made.router("router")
        await in_thread(made.until_ready, "prefill-0", "decode-0")
        async with traffic([url]) as load:
            await load.until_answered(5)
            made.worker("decode-1", "decode")
            await in_thread(made.until_ready, "prefill-0", "decode-0", "decode-1")
            await load.until_answered(10)
            made.send("decode-0", signal.SIGTERM)
            assert await in_thread(made.ended, "decode-0") == 0
            await in_thread(made.until_ready, "prefill-0", "decode-1")
            await load.until_answered(10)  # by the one that came later: there is no other
            made.worker("prefill-1", "prefill")
            await in_thread(made.until_ready, "prefill-0", "prefill-1", "decode-1")
            made.send("prefill-0", signal.SIGTERM)
            assert await in_thread(made.ended, "prefill-0") == 0
            await load.until_answered(10)


# --- several routers -----------------------------------------------------------------------------------------


async def test_two_routers_see_all_workers_and_hold_parts_of_one_limit(two_routers: Fleet, redis: RedisServer) -> None:
    from core.registry.redis_store import open_store

    async with traffic(two_routers.urls, clients=6) as load:
        store = open_store(redis.url)
        for _ in range(20):
            values = await patiently(lambda: store.read("quota:requests"))
            parts = {router: int(value.split()[0]) for router, value in values.items()}
            assert sum(parts.values()) <= LIMIT, parts
            await asyncio.sleep(0.05)
        assert len(parts) == 2 and min(parts.values()) >= 6, parts
        await store.close()
        await load.until_answered(6)
    for url in two_routers.urls:
        view = await in_thread(two_routers.view, url)
        assert len(view["routers"]) == 2 and two_routers.ready(url) == {"prefill-0", "decode-0"}


async def test_baton_serve_runs_several_routers_over_the_same_workers(redis: RedisServer) -> None:
    registry = ("--registry", redis.url, "--registry-prefix", "served")
    with serving("--routers", "2", *registry) as cluster:
        urls = [cluster.url, f"http://127.0.0.1:{cluster.port + 1}"]
        assert all(metric(url, "baton:registry_up") == 1.0 for url in urls)
        async with traffic(urls) as load:
            await load.until_answered(10)


async def test_a_request_that_cost_two_workers_is_refused_by_the_other_router_at_once(redis: RedisServer) -> None:
    deadly = body(some_tokens(66, 1900), 5)
    with fleet(redis.url.removesuffix("0") + "2", 0.0) as made:
        for name in ("prefill-0", "prefill-1"):
            made.worker(name, "prefill")
        made.worker("decode-0", "decode")
        one, other = made.router("one"), made.router("other")
        await in_thread(made.until_ready, "prefill-0", "prefill-1", "decode-0")
        async with httpx.AsyncClient() as client:
            made.send("prefill-0", signal.SIGSTOP)
            asking = asyncio.create_task(client.post(f"{one}/v1/completions", json=deadly, timeout=60))
            await asyncio.sleep(0.5)
            made.send("prefill-0", signal.SIGKILL)  # of two that are equal the first by name has it
            while "prefill-0" in await in_thread(made.ready, one) or not asking.done():
                made.send("prefill-1", signal.SIGSTOP)  # it is heard from time to time, and hardly computes
                if "prefill-0" not in await in_thread(made.ready, one):
                    await asyncio.sleep(0.5)
                    break
                await asyncio.sleep(0.8)
                made.send("prefill-1", signal.SIGCONT)
                await asyncio.sleep(0.06)
            made.send("prefill-1", signal.SIGKILL)
            first = await asking
            assert first.json()["error"]["code"] == "poison_request", first.text
            began_s = time.monotonic()
            again = await client.post(f"{other}/v1/completions", json=deadly, timeout=60)
            assert again.json()["error"]["code"] == "poison_request", again.text
            assert time.monotonic() - began_s < 5, "without a try, and without waiting for workers"
            fine = await client.post(f"{other}/v1/completions", json=body(some_tokens(67, 20), 5), timeout=60)
            assert fine.status_code == 200, "others are served"


# --- what Redis may do ---------------------------------------------------------------------------------------


async def redis_cli(redis: RedisServer, command: str) -> None:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec("redis-cli", "-p", str(redis.port), command, stdout=quiet)
    assert await process.wait() == 0


async def spoil(redis: RedisServer, how: str, copy: Path) -> None:
    if how == "stopped":
        redis.signal(signal.SIGSTOP)
    elif how == "flushed":
        await redis_cli(redis, "flushall")
    else:
        await in_thread(redis.stop)
    if how == "old copy":
        shutil.copy(copy, redis.folder / "dump.rdb")
    if how in ("old copy", "empty"):
        await in_thread(redis.start)


async def mend(redis: RedisServer, how: str) -> None:
    if how == "stopped":
        redis.signal(signal.SIGCONT)
    elif how == "killed":
        await in_thread(redis.start)
    (redis.folder / "dump.rdb").unlink(missing_ok=True)


async def keep_old_copy(redis: RedisServer, at: Path) -> None:
    """Of a time when other workers were there, one of them under a name of today."""
    from core.registry.redis_store import open_store

    store = open_store(redis.url)
    living = decode((await patiently(lambda: store.read(GROUP)))["decode-0"])
    assert living is not None
    for name in ("decode-0", "decode-ghost"):
        info = WorkerInfo(
            WorkerId(name, 1),
            Role.DECODE,
            living.info.identity,
            living.info.layout,
            living.info.page_size,
            living.info.pages_total,
            living.info.max_context_tokens,
            NOWHERE,
        )
        old = WorkerRecord(info, NOWHERE, WorkerState.READY, {}, living.model)
        await patiently(lambda name=name, old=old: store.put(GROUP, name, old.encode(), 300.0))  # type: ignore[misc]
    await redis_cli(redis, "save")
    (redis.folder / "dump.rdb").rename(at)
    await patiently(lambda: store.remove(GROUP, "decode-ghost"))
    await store.close()


@pytest.mark.parametrize("how", ["killed", "stopped", "flushed", "old copy", "empty"])
async def test_whatever_redis_does_requests_are_answered_as_before(
    how: str, two_routers: Fleet, redis: RedisServer, tmp_path: Path
) -> None:
    copy = tmp_path / "old.rdb"
    async with traffic(two_routers.urls) as load:
        if how == "old copy":
            await keep_old_copy(redis, copy)
        before_s = await load.until_answered(25)
        await spoil(redis, how, copy)
        if how in ("killed", "stopped"):
            await in_thread(
                two_routers.until,
                "the routers say so",
                lambda: all(metric(url, "baton:registry_up") == 0.0 for url in two_routers.urls),
            )
        if how == "old copy":
            await in_thread(two_routers.until, "the routers read the old copy", lambda: sees_ghost(two_routers))
        during_s = await load.until_answered(25)
        await mend(redis, how)
        mended_s = time.monotonic()
        await in_thread(two_routers.until, "what Redis knew is there again", lambda: is_whole(two_routers, redis))
        assert time.monotonic() - mended_s < REBUILT_S
        after_s = await load.until_answered(10)
    assert max(during_s + after_s) < max(2 * max(before_s), max(before_s) + 0.5), "no token waits for Redis"
    if how == "old copy":
        from core.registry.redis_store import open_store

        store = open_store(redis.url)
        await patiently(lambda: store.remove(GROUP, "decode-ghost"))
        await store.close()


def sees_ghost(made: Fleet) -> bool:
    return any(worker["name"] == "decode-ghost" for worker in made.view(made.urls[0]).get("workers", ()))


def is_whole(made: Fleet, redis: RedisServer) -> bool:
    """Both routers hear Redis, and it has the living workers, routers and parts."""

    async def found() -> bool:
        from core.registry.redis_store import open_store

        store = open_store(redis.url)
        records = {name: decode(value) for name, value in (await patiently(lambda: store.read(GROUP))).items()}
        living = {name for name, record in records.items() if record is not None and record.endpoint != NOWHERE}
        groups = []
        for group in ("routers", "quota:requests", "quota:queued_tokens"):
            groups.append(len(await patiently(lambda group=group: store.read(group))))  # type: ignore[misc]
        await store.close()
        return living == {"prefill-0", "decode-0"} and groups == [2, 2, 2]

    up = all(metric(url, "baton:registry_up") == 1.0 for url in made.urls)
    return up and all(metric(url, "baton:cluster_view_age_seconds") < 5 for url in made.urls) and asyncio.run(found())
