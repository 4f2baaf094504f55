"""The shared store and the registry over it: one contract for memory and a real Redis, and what happens without it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer, redis_server

from core.clock import monotonic_s
from core.errors import ConfigError, RegistryAway
from core.messages import Role, WorkerId, WorkerInfo
from core.registry.breaker import Breaker, GuardedStore
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.poison import PoisonCounts
from core.registry.quota import Quota
from core.registry.records import WorkerRecord, WorkerState, decode
from core.registry.registry import GROUP, Registry, RegistryTiming
from core.registry.store import MAX_VALUE_BYTES, Store

QUICK = RegistryTiming(life_s=0.6, renew_s=0.15, poll_s=0.1, gap_s=0.01)


def record(name: str = "d0", incarnation: int = 1, state: WorkerState = WorkerState.READY) -> WorkerRecord:
    info = WorkerInfo(WorkerId(name, incarnation), Role.DECODE, "identity", "layout", 16, 100, 4096, "host:1")
    return WorkerRecord(info, "host:1", state, {"zone": "a"})


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
async def store_maker(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], Store]]:
    """Makes stores that share what they hold."""
    made: list[Store] = []
    if request.param == "memory":
        shelf = MemoryShelf(monotonic_s)

        def make() -> Store:
            return MemoryStore(shelf)
    else:
        from core.registry.redis_store import open_store

        server: RedisServer = request.getfixturevalue("redis")

        def make() -> Store:
            made.append(open_store(server.url, prefix=request.node.name))
            return made[-1]

    yield make
    for store in made:
        await store.close()


# --- the store's contract ------------------------------------------------------------------------------------


async def test_what_one_puts_the_others_read_until_its_life_is_over(store_maker: Callable[[], Store]) -> None:
    one, other = store_maker(), store_maker()
    await one.put("g", "a", b"1", 60.0)
    await one.put("g", "b", b"2", 0.05)
    await one.put("h", "a", b"3", 60.0)
    assert await other.read("g") == {"a": b"1", "b": b"2"}
    await one.put("g", "a", b"\x00\xff", 60.0)
    await asyncio.sleep(0.08)
    assert await other.read("g") == {"a": b"\x00\xff"} == await other.read("g")
    await other.remove("g", "a")
    await other.remove("g", "never was")
    assert await one.read("g") == {}
    assert await one.read("h") == {"a": b"3"}


async def test_a_value_lives_as_long_as_it_is_renewed(store_maker: Callable[[], Store]) -> None:
    store = store_maker()
    for _ in range(5):
        await store.put("g", "a", b"1", 0.1)
        await asyncio.sleep(0.05)
        assert await store.read("g") == {"a": b"1"}


async def test_counters_add_up_over_members_and_begin_anew_after_their_life(
    store_maker: Callable[[], Store],
) -> None:
    one, other = store_maker(), store_maker()
    sums = await asyncio.gather(*(store.add("c", 2, 0.3) for store in (one, other) * 10))
    assert sorted(sums) == list(range(2, 41, 2))
    assert await one.add("c", -5, 0.3) == 35
    await asyncio.sleep(0.35)  # counted from the first addition: later ones do not prolong it
    assert await one.add("c", 1, 0.3) == 1


async def test_listeners_hear_of_a_change_in_their_group(store_maker: Callable[[], Store]) -> None:
    one, other = store_maker(), store_maker()
    async with aclosing(other.listen("g")) as changes:  # type: ignore[type-var]
        async with asyncio.timeout(5):
            await anext(changes)
            await one.tell("another")
            await one.tell("g")
            await anext(changes)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(changes)


# --- the registry over it ------------------------------------------------------------------------------------


@asynccontextmanager
async def member(store: Store, seed: int = 1) -> AsyncIterator[Registry]:
    registry = Registry(store, monotonic_s, Random(seed), QUICK)
    running = asyncio.create_task(registry.run())
    try:
        yield registry
    finally:
        running.cancel()
        await asyncio.wait([running])


async def until(condition: Callable[[], bool], within_s: float = 3.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_every_member_sees_every_worker_come_change_and_go(store_maker: Callable[[], Store]) -> None:
    make = store_maker
    async with member(make(), 1) as worker, member(make(), 2) as router, member(make(), 3) as third:
        worker.announce(record())
        for other in (router, third):
            await until(lambda other=other: "d0" in other.snapshot.records)  # type: ignore[misc]
            assert other.snapshot.records["d0"] == record()
        worker.announce(record(state=WorkerState.DRAINING))
        await until(lambda: router.snapshot.records["d0"].state is WorkerState.DRAINING)
        await asyncio.sleep(2 * QUICK.life_s)
        assert "d0" in router.snapshot.records, "it is renewed"
        await worker.withdraw(WorkerId("d0", 1))
        await until(lambda: not router.snapshot.records and not third.snapshot.records)


async def test_a_worker_that_dies_is_forgotten_within_its_lease(store_maker: Callable[[], Store]) -> None:
    async with member(store_maker(), 2) as router:
        async with member(store_maker(), 1) as worker:
            worker.announce(record())
            await until(lambda: "d0" in router.snapshot.records)
        began_s = monotonic_s()
        await until(lambda: not router.snapshot.records)
        assert monotonic_s() - began_s < QUICK.life_s + 2 * QUICK.poll_s + 0.3


async def test_a_snapshot_is_never_changed_and_changed_wakes_for_news_only() -> None:
    shelf = MemoryShelf(monotonic_s)
    async with member(MemoryStore(shelf)) as registry:
        await until(lambda: registry.snapshot.read_s is not None)
        first = registry.snapshot
        waiting = asyncio.create_task(registry.changed())
        await asyncio.sleep(0.3)
        assert not waiting.done() and registry.snapshot.number == first.number
        registry.announce(record())
        await asyncio.wait_for(waiting, 2)
        assert not first.records and registry.snapshot.number == first.number + 1
        with pytest.raises(TypeError):
            registry.snapshot.records["x"] = record()  # type: ignore[index]


@pytest.mark.parametrize("value", [b"", b"{}", b"null", b"\xff", b"[]", b'{"version":2}', b"[" * 10_000])
async def test_what_this_version_cannot_read_is_left_out(value: bytes) -> None:
    shelf = MemoryShelf(monotonic_s)
    shelf.put((GROUP, "odd"), value, 60.0)
    shelf.put((GROUP, "another name"), record().encode(), 60.0)
    async with member(MemoryStore(shelf)) as registry:
        registry.announce(record())
        await until(lambda: "d0" in registry.snapshot.records)
        assert set(registry.snapshot.records) == {"d0"}


def test_a_record_is_read_as_it_was_written() -> None:
    for state in WorkerState:
        assert decode(record(state=state).encode()) == record(state=state)
    assert decode(b" " * (MAX_VALUE_BYTES + 1)) is None
    assert decode(record().encode().replace(b'"page_size":16', b'"page_size":true')) is None
    assert decode(record().encode().replace(b'"page_size":16', b'"page_size":-1')) is None


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_make_the_reader_fail(noise: bytes, at: int) -> None:
    written = record().encode()
    decode(noise)
    decode(written[:at] + noise + written[at + len(noise) :])


# --- without the store ---------------------------------------------------------------------------------------


async def test_while_the_store_is_away_the_last_snapshot_stands() -> None:
    shelf = MemoryShelf(monotonic_s)
    async with member(GuardedStore(MemoryStore(shelf), monotonic_s)) as registry:
        registry.announce(record())
        await until(lambda: "d0" in registry.snapshot.records)
        shelf.away = True
        await until(lambda: registry.is_away)
        await asyncio.sleep(2 * QUICK.life_s)
        assert registry.snapshot.records["d0"] == record()
        assert registry.snapshot.age_s(monotonic_s()) > QUICK.life_s
        shelf.clear()
        shelf.away = False
        await until(lambda: not registry.is_away and registry.snapshot.age_s(monotonic_s()) < QUICK.life_s, 12)
        await until(lambda: "d0" in registry.snapshot.records)


class Misbehaving(MemoryStore):
    """While told to, fails with an error that no store should let out."""

    misbehaves = False

    async def read(self, group: str) -> dict[str, bytes]:
        self._fail()
        return await super().read(group)

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        self._fail()
        await super().put(group, name, value, life_s)

    def _fail(self) -> None:
        if self.misbehaves:
            raise KeyError("a mistake of ours")


async def test_a_mistake_in_a_store_ends_no_loop_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    shelf = MemoryShelf(monotonic_s)
    store = Misbehaving(shelf)
    async with member(store) as one, member(MemoryStore(shelf), 2) as other:
        one.announce(record())
        await until(lambda: "d0" in other.snapshot.records)
        store.misbehaves = True
        await until(lambda: "d0" not in other.snapshot.records)  # its lease has run out
        store.misbehaves = False
        await until(lambda: "d0" in other.snapshot.records)
    assert "a mistake of ours" in caplog.text


class ClosedSocket:
    """A client whose connection uvloop has closed under it."""

    async def smembers(self, key: str) -> set[bytes]:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_socket_closed_under_the_client_is_a_store_that_is_away() -> None:
    from core.registry.redis_store import RedisStore

    with pytest.raises(RegistryAway, match="the handler is closed"):
        await RedisStore(ClosedSocket(), "baton").read("g")


async def test_an_old_copy_of_the_store_is_corrected_by_those_who_live() -> None:
    shelf = MemoryShelf(monotonic_s)
    async with member(MemoryStore(shelf), 1) as worker, member(MemoryStore(shelf), 2) as router:
        worker.announce(record(incarnation=1))
        worker.announce(record("gone", 7))
        await until(lambda: len(router.snapshot.records) == 2)
        old = shelf.copy()
        await worker.withdraw(WorkerId("gone", 7))
        await worker.withdraw(WorkerId("d0", 1))
        worker.announce(record(incarnation=2))
        await until(lambda: router.snapshot.records.get("d0") == record(incarnation=2))
        shelf.restore(old)
        await until(lambda: set(router.snapshot.records) == {"d0"})
        assert router.snapshot.records["d0"] == record(incarnation=2)


class _Stuck(MemoryStore):
    """Answers when it is too late."""

    calls = 0

    async def read(self, group: str) -> dict[str, bytes]:
        self.calls += 1
        await asyncio.sleep(30)
        return {}


async def test_a_store_that_hangs_costs_a_tenth_of_a_second_and_soon_nothing() -> None:
    now_s = 0.0
    stuck = _Stuck(MemoryShelf(lambda: now_s))
    guarded = GuardedStore(stuck, lambda: now_s, timeout_s=0.02)
    for _ in range(10):
        began_s = monotonic_s()
        with pytest.raises(RegistryAway):
            await guarded.read("g")
        assert monotonic_s() - began_s < 0.5
    assert stuck.calls == 3 and guarded.is_away
    now_s = 0.6
    with pytest.raises(RegistryAway):
        await guarded.read("g")
    assert stuck.calls == 4, "one call is the trial"


def test_a_breaker_waits_longer_each_time_and_closes_at_the_first_success() -> None:
    breaker, now_s, pauses = Breaker(), 0.0, []
    for _ in range(2):
        breaker.failed(now_s)
    assert breaker.admits(now_s)
    for _ in range(8):
        breaker.failed(now_s)
        began_s = now_s
        while not breaker.admits(now_s):
            now_s += 0.125
        pauses.append(now_s - began_s)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    breaker.succeeded()
    assert not breaker.is_open and breaker.admits(now_s)


@pytest.mark.parametrize("how", ["killed", "stopped", "flushed"])
async def test_redis_goes_and_comes_back_empty(how: str, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        from core.registry.redis_store import open_store

        stores = [open_store(server.url), open_store(server.url)]
        guards = [GuardedStore(store, monotonic_s) for store in stores]
        async with member(guards[0], 1) as worker, member(guards[1], 2) as router:
            worker.announce(record())
            await until(lambda: "d0" in router.snapshot.records)
            if how == "killed":
                server.stop()
            elif how == "stopped":
                server.signal(signal.SIGSTOP)
            else:
                await stores[0]._redis.flushall()
            if how != "flushed":
                await until(lambda: router.is_away)
                await asyncio.sleep(2 * QUICK.life_s)
                assert "d0" in router.snapshot.records, "the last snapshot stands"
            if how == "killed":
                server.start()
            elif how == "stopped":
                server.signal(signal.SIGCONT)
            number = router.snapshot.number
            await until(lambda: not router.is_away and "d0" in router.snapshot.records, 15)
            assert router.snapshot.number >= number
        for store in stores:
            await store.close()


ACL = "~{baton}:* &{baton}:* +@read +@write +@pubsub +@transaction +@connection -@dangerous -@scripting -@admin"


async def test_a_user_without_scripts_and_without_other_keys_is_enough(tmp_path: Path) -> None:
    users = tmp_path / "users.acl"
    users.write_text(f"user default off\nuser baton on >secret {ACL}\n")
    with redis_server(tmp_path, "--aclfile", str(users)) as server:
        from core.registry.redis_store import open_store

        store = open_store(server.url.replace("//", "//baton:secret@"))
        await store.put("g", "a", b"1", 5.0)
        assert await store.read("g") == {"a": b"1"} and await store.add("c", 1, 5.0) == 1
        async with aclosing(store.listen("g")) as changes:  # type: ignore[type-var]
            await anext(changes)
            await store.tell("g")
            await anext(changes)
        await store.remove("g", "a")
        await store.close()
        for url, prefix in ((server.url, "baton"), (server.url.replace("//", "//baton:secret@"), "others")):
            stranger = open_store(url, prefix)
            with pytest.raises(RegistryAway):
                await stranger.put("g", "a", b"1", 5.0)
            await stranger.close()


async def test_a_url_that_means_nothing_says_so() -> None:
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    from core.registry.redis_store import open_store

    for url in ("http://host", "redis://host:port", "redis+sentinel://host/service", "redis+sentinel://host:1"):
        with pytest.raises(ConfigError):
            open_store(url)


def test_a_record_cannot_be_changed_by_what_it_was_made_from() -> None:
    assert replace(record(), endpoint="elsewhere").info == record().info


# --- limits in sum -------------------------------------------------------------------------------------------


@asynccontextmanager
async def quotas(stores: list[Store], limit: int) -> AsyncIterator[list[Quota]]:
    made = [
        Quota(store, monotonic_s, Random(n), name="requests", router=f"r{n}", limit=limit, timing=QUICK)
        for n, store in enumerate(stores)
    ]
    running = [asyncio.create_task(quota.run()) for quota in made]
    try:
        yield made
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


async def test_parts_of_a_limit_follow_the_use_and_never_add_up_to_more(store_maker: Callable[[], Store]) -> None:
    random = Random(5)
    async with quotas([store_maker() for _ in range(3)], 100) as parts:
        most = 0
        for _ in range(60):
            random.choice(parts).use(random.choice([0, 10, 50, 100, 500]))
            await asyncio.sleep(0.01)
            total = sum(part.held for part in parts)
            assert total <= 100
            most = max(most, total)
        assert most > 60, "what is wanted is given"
        for part in parts[1:]:
            part.use(0)
        parts[0].use(100)
        await until(lambda: parts[0].held >= 80)  # the others keep a stride each
        assert sum(part.held for part in parts) <= 100


async def test_a_dead_routers_part_comes_back() -> None:
    shelf = MemoryShelf(monotonic_s)
    shelf.put(("quota:requests", "dead"), b"90 90", 0.8)
    async with quotas([MemoryStore(shelf)], 100) as (part,):
        part.use(100)
        await until(lambda: part.held > 0)
        assert part.held <= 10
        await until(lambda: part.held == 100)


async def test_while_the_store_is_away_a_part_stays_and_none_grows_until_all_have_written_theirs() -> None:
    shelf = MemoryShelf(monotonic_s)
    async with quotas([MemoryStore(shelf), MemoryStore(shelf)], 100) as (one, other):
        one.use(40)
        other.use(40)
        await until(lambda: one.held >= 40 and other.held >= 40)
        for how in ("away", "emptied"):
            shelf.away = how == "away"
            if how == "emptied":
                shelf.clear()
            one.use(100)
            other.use(100)
            for _ in range(40):
                await asyncio.sleep(0.01)
                assert one.held >= 40 and other.held >= 40 and one.held + other.held <= 100
            shelf.clear()
            shelf.away = False
            for _ in range(60):
                await asyncio.sleep(0.01)
                assert one.held >= 40 and other.held >= 40 and one.held + other.held <= 100, how


async def test_a_router_with_nothing_gets_its_fair_share_from_one_that_has_everything() -> None:
    shelf = MemoryShelf(monotonic_s)
    async with quotas([MemoryStore(shelf), MemoryStore(shelf)], 96) as (greedy, late):
        greedy.use(96)
        await until(lambda: greedy.held > 70)
        used = greedy.held  # all of it is in use, and given back as it ends
        greedy.use(used, 96)
        late.use(0, 40)
        await until(lambda: greedy.held <= 56)
        assert late.held <= 96 - used
        while used > 50:
            used -= 2
            greedy.use(used, 96)  # it would use all of it again
            await asyncio.sleep(0.01)
        await until(lambda: late.held >= 40)
        assert greedy.held + late.held <= 96


# --- poison --------------------------------------------------------------------------------------------------


async def test_what_cost_one_router_a_worker_is_known_to_the_others(store_maker: Callable[[], Store]) -> None:
    one, other = PoisonCounts(store_maker(), monotonic_s), PoisonCounts(store_maker(), monotonic_s)
    one.cost_a_worker(b"x", WorkerId("p0", 1))
    one.cost_a_worker(b"x", WorkerId("p0", 1))  # several requests with it were lost with the same worker
    assert (one.count(b"x"), other.count(b"x"), one.count(b"y")) == (1, 0, 0)
    await one.refresh()
    await other.refresh()
    assert other.count(b"x") == 1
    other.cost_a_worker(b"x", WorkerId("p0", 1))
    assert other.count(b"x") == 1
    other.cost_a_worker(b"x", WorkerId("p1", 1))
    await other.refresh()
    await one.refresh()
    assert one.count(b"x") == other.count(b"x") == 2


async def test_what_has_been_answered_is_no_poison_anywhere(store_maker: Callable[[], Store]) -> None:
    one, other = PoisonCounts(store_maker(), monotonic_s), PoisonCounts(store_maker(), monotonic_s)
    one.cost_a_worker(b"x", WorkerId("p0", 1))
    await one.refresh()
    await other.refresh()
    other.answered(b"x")
    assert other.count(b"x") == 0
    await other.refresh()
    await one.refresh()
    assert one.count(b"x") == other.count(b"x") == 0


async def test_notes_are_written_again_into_a_store_that_forgot_them() -> None:
    shelf = MemoryShelf(monotonic_s)
    one, other = PoisonCounts(MemoryStore(shelf), monotonic_s), PoisonCounts(MemoryStore(shelf), monotonic_s)
    one.cost_a_worker(b"x", WorkerId("p0", 1))
    await one.refresh()
    shelf.clear()
    for _ in range(2):
        await one.refresh()
    await other.refresh()
    assert other.count(b"x") == 1


async def test_counts_hold_here_without_the_store_and_are_bounded_and_forgotten() -> None:
    now_s = 0.0
    shelf = MemoryShelf(lambda: now_s)
    counts = PoisonCounts(MemoryStore(shelf), lambda: now_s, life_s=10.0, limit=3)
    shelf.away = True
    for number, content in enumerate((b"a", b"b", b"c", b"d", b"d")):
        counts.cost_a_worker(content, WorkerId("p", number))
    await counts.refresh()
    assert [counts.count(content) for content in (b"a", b"b", b"c", b"d")] == [0, 1, 1, 2]
    now_s = 11.0
    assert counts.count(b"d") == 0
