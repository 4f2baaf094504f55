"""A worker that drains: no client sees it, nothing counts as a failure, and what nobody else can do it does itself."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from core.sampling import SamplingParams
from tests.simulation.cluster import SimCluster
from tests.simulation.test_calm import prompt_of
from tests.simulation.test_faults import finish
from tests.simulation.virtual_time import run

LONG = 300  # tokens, of 20 ms and more each


async def served(cluster: SimCluster, *, choices: int = 1) -> list[asyncio.Task[str]]:
    """Twelve long generations: some run, some are queued."""
    await cluster.start()
    for router in cluster.routers:
        router.saga._budget.level = router.saga._budget.most = 0.0
    prompts = [prompt_of(Random(n), 150 + 10 * n) for n in range(12)]
    wished = [SamplingParams(max_tokens=LONG, n=choices, temperature=float(n % 2), seed=n) for n in range(12)]
    return [
        cluster.spawn(finish(cluster, f"r{n}", prompt, params))
        for n, (prompt, params) in enumerate(zip(prompts, wished, strict=True))
    ]


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("drain_s", [0.2, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at_s", [0.05, 1.0])
def test_every_request_ends_right_without_a_retry(name: str, drain_s: float, at_s: float, choices: int) -> None:
    async def main() -> None:
        cluster = SimCluster(3, prefill=2, decode=2, pages=1500, step_s=0.02)
        tasks = await served(cluster, choices=choices)
        await asyncio.sleep(at_s)
        began_s = asyncio.get_running_loop().time()
        ended = await cluster.drain(name, drain_s)
        assert asyncio.get_running_loop().time() - began_s < drain_s + 1.0
        assert set(await asyncio.gather(*tasks)) == {"right"}
        assert ended in ("finished", "handed_back")
        if name == "decode-0":
            assert (ended == "finished") == (drain_s == 60.0)
        assert sum(router.counts.retries for router in cluster.routers) == 0
        for router in cluster.routers:
            assert not router.saga._pairs._records, "a pair is not shunned for a drain"
        assert await cluster.quiesce() == []
        assert not cluster.violations
        await cluster.close()

    run(main())


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_nobody_can_follow_finishes_what_it_has(name: str) -> None:
    async def main() -> str:
        cluster = SimCluster(3, prefill=1, decode=1, pages=1500, step_s=0.02)
        tasks = await served(cluster)
        await asyncio.sleep(0.4)
        ended = await cluster.drain(name, 120.0)
        assert set(await asyncio.gather(*tasks)) == {"right"}
        assert await cluster.quiesce() == []
        await cluster.close()
        return ended

    assert run(main()) == "finished"


def test_all_workers_are_replaced_one_after_the_other() -> None:
    """A rolling update, with less time for each than a generation takes."""

    async def main() -> None:
        cluster = SimCluster(5, prefill=2, decode=2, pages=1500, step_s=0.02)
        tasks = await served(cluster)
        for name in cluster.names:
            await cluster.drain(name, 1.0)
            await asyncio.sleep(0.5)
        assert set(await asyncio.gather(*tasks)) == {"right"}
        assert cluster.drained.count("handed_back") >= 2 and "cut_short" not in cluster.drained
        assert sum(router.counts.retries for router in cluster.routers) == 0
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())
