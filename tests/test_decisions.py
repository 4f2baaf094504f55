"""Scaling decisions in the shared store: written, read by all, gone when nobody stands by them, noise left out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer, redis_server

from core.errors import RegistryAway
from core.registry.decisions import GROUP, LIFE_S, MAX_REASON, Decision, decode, publish, read
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.store import MAX_VALUE_BYTES, Store

DECODE = Decision("decode", desired=3, ready=2, reason="pages: 2.4 workers' worth of pages are projected")
PREFILL = Decision("prefill", desired=1, ready=1, reason="")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore(MemoryShelf(lambda: 0.0))
        return
    from core.registry.redis_store import open_store

    server: RedisServer = request.getfixturevalue("redis")
    store = open_store(server.url, prefix=request.node.name)
    yield store
    await store.close()


async def test_a_decision_is_read_by_its_tier_and_replaced_by_the_next(store: Store) -> None:
    assert await read(store) == {}
    await publish(store, DECODE)
    await publish(store, PREFILL)
    assert await read(store) == {"decode": DECODE, "prefill": PREFILL}
    lower = Decision("decode", 1, 3, "idle")
    await publish(store, lower)
    assert await read(store) == {"decode": lower, "prefill": PREFILL}


async def test_what_cannot_be_read_or_lies_under_another_name_is_left_out(store: Store) -> None:
    await publish(store, DECODE)
    await store.put(GROUP, "prefill", b"not JSON", LIFE_S)
    await store.put(GROUP, "router", DECODE.encode(), LIFE_S)
    assert await read(store) == {"decode": DECODE}


async def test_a_decision_that_nobody_writes_again_vanishes() -> None:
    now_s = [0.0]
    store = MemoryStore(MemoryShelf(lambda: now_s[0]))
    await publish(store, DECODE)
    now_s[0] = LIFE_S - 0.01
    assert await read(store) == {"decode": DECODE}
    now_s[0] = LIFE_S + 0.01
    assert await read(store) == {}


async def test_a_store_that_is_away_says_so() -> None:
    shelf = MemoryShelf(lambda: 0.0)
    shelf.away = True
    with pytest.raises(RegistryAway):
        await publish(MemoryStore(shelf), DECODE)
    with pytest.raises(RegistryAway):
        await read(MemoryStore(shelf))


def test_a_long_reason_is_cut_and_still_fits() -> None:
    written = Decision("decode", 1, 1, "\U0001f600" * 1000).encode()
    assert len(written) < MAX_VALUE_BYTES
    found = decode(written)
    assert found is not None and found.reason == "\U0001f600" * MAX_REASON


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version":1', b'"version":2'),
        (b'"desired":3', b'"desired":true'),
        (b'"desired":3', b'"desired":-1'),
        (b'"desired":3', b'"desired":3.5'),
        (b'"desired":3', b'"desired":99999999999'),
        (b'"ready":2', b'"ready":"2"'),
        (b'"ready":2', b'"ready":2,"more":1'),
        (b'"tier":"decode"', b'"tier":""'),
        (b'"tier":"decode"', b'"tier":null'),
        (b'"reason":"', b'"reason":"\\ud800'),
    ],
)
def test_another_versions_or_a_wrong_decision_is_not_read(old: bytes, new: bytes) -> None:
    written = DECODE.encode()
    assert decode(written) == DECODE and old in written
    assert decode(written.replace(old, new)) is None


@given(noise=st.binary(max_size=40), at=st.integers(0, 80))
def test_no_bytes_break_the_reader(noise: bytes, at: int) -> None:
    written = DECODE.encode()
    decode(noise)
    decode(written[:at] + noise + written[at + len(noise) :])
