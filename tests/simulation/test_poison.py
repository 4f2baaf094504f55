"""Routers that share what lost workers were doing: the culprit is refused everywhere, whoever was beside it is not."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import PoisonRequest
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.poison import PoisonCounts
from core.sampling import SamplingParams
from router.generation import GenerationRequest
from router.poison import content_of
from tests.simulation.cluster import POISON, SimCluster, request_of
from tests.simulation.virtual_time import run


def deadly(name: str, seed: int = 0) -> GenerationRequest:
    return request_of(name, [POISON] + [1] * 100, SamplingParams(max_tokens=9, seed=seed))


def share(cluster: SimCluster) -> tuple[list[PoisonCounts], list[asyncio.Task[None]]]:
    """Over one store, each router with its own loop."""
    clock = asyncio.get_running_loop().time
    shelf = MemoryShelf(clock)
    books = [PoisonCounts(MemoryStore(shelf), clock) for _ in cluster.routers]
    for router, book in zip(cluster.routers, books, strict=True):
        router.saga._poison = book
    return books, [asyncio.create_task(book.run()) for book in books]


async def finished(cluster: SimCluster, loops: list[asyncio.Task[None]]) -> None:
    for task in loops:
        task.cancel()
    await asyncio.wait(loops)
    await cluster.close()


def test_what_killed_two_workers_of_one_router_kills_none_of_another() -> None:
    async def main() -> None:
        cluster = SimCluster(1, prefill=4, decode=1, routers=2)
        await cluster.start()
        _, loops = share(cluster)
        with pytest.raises(PoisonRequest):
            await cluster.routers[0].generate(deadly("r"))
        assert len(cluster.poisoned) == 2
        await asyncio.sleep(2)
        for router in cluster.routers:
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(PoisonRequest):
                await router.generate(deadly("again", seed=5))
            assert asyncio.get_running_loop().time() == began_s, "it is not tried"
        assert len(cluster.poisoned) == 2
        await finished(cluster, loops)

    run(main())


def test_whoever_was_beside_it_is_answered_and_cleared() -> None:
    async def main() -> None:
        cluster = SimCluster(2, prefill=4, decode=1, routers=2)
        await cluster.start()
        books, loops = share(cluster)
        beside = [request_of(f"b{n}", [3 + n] * 150, SamplingParams(max_tokens=9, seed=0)) for n in range(8)]
        asked = [cluster.spawn(cluster.routers[n % 2].generate(request)) for n, request in enumerate(beside)]
        culprit = cluster.spawn(cluster.routers[0].generate(deadly("r")))
        with pytest.raises(PoisonRequest):
            await culprit
        assert all(await asyncio.gather(*asked)), "each is answered"
        await asyncio.sleep(3)
        for book in books:
            assert book.count(content_of(deadly("r"))) == 2
            assert not any(book.count(content_of(request)) for request in beside)
        await finished(cluster, loops)

    run(main())
