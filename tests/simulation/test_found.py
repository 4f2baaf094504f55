"""What the simulation has found, each as the smallest test that shows it."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from core.errors import NoCapacity, PoisonRequest, WorkerDraining
from core.messages import Receipt, RequestFailed, Token, Tokens
from core.sampling import SamplingParams
from kvtransfer.chores import Chores
from session.outlet import Outlet
from tests.simulation.cluster import POISON, SimCluster, request_of
from tests.simulation.test_calm import prompt_of
from tests.simulation.test_faults import finish
from tests.simulation.virtual_time import run


async def test_a_receipt_is_not_lost_with_the_session_that_carried_it() -> None:
    """The prefill worker's token 0 had come; the decode worker's first message, which repeats it, was lost."""
    outlet = Outlet(lambda: 0.0)
    outlet.open("router", {})
    outlet.hold("router", ("r", 1))
    outlet.send([Tokens("r", 1, (Token(0, 0, 7),), Receipt(computed_tokens=5))])
    resumed, _ = outlet.open("router", {("r", 1): (1,)})
    batch = resumed.messages.get_nowait()
    assert [item.receipt for item in batch.items] == [Receipt(computed_tokens=5)]  # type: ignore[union-attr]


def test_a_request_whose_only_token_comes_from_prefill_has_a_receipt() -> None:
    async def main() -> list[int]:
        cluster = SimCluster(1, prefill=1, decode=1)
        await cluster.start()
        steps = await cluster.generate(request_of("r", [1] * 100, SamplingParams(max_tokens=1, seed=0)))
        await cluster.close()
        return [step.receipt.prompt_tokens for step in steps if step.receipt is not None]

    assert run(main()) == [100]


@pytest.mark.parametrize("seed", range(6))
def test_a_client_is_not_told_that_a_worker_cancelled(seed: int) -> None:
    """No grant came in time: whichever worker says so first, it is tried again, and is `no_capacity` in the end."""

    async def main() -> None:
        cluster = SimCluster(seed, prefill=1, decode=1)
        await cluster.start()
        pool = cluster.alive["decode-0"].worker.pool
        held = pool.allocate(pool.reusable) or []
        stays = cluster.spawn(cluster.generate(request_of("r", [1] * 100, SamplingParams(max_tokens=9, seed=0))))
        with pytest.raises(NoCapacity):
            await stays
        pool.release_all(held)
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_a_worker_whose_loss_its_peer_reports_first_counts_as_lost() -> None:
    """The decode worker's clock jumps, so that it gives the dead prefill worker up before the router does."""

    async def main() -> int:
        cluster = SimCluster(1, prefill=4, decode=1)
        await cluster.start()
        decode = cluster.alive["decode-0"]
        request = request_of("r", [POISON] + [1] * 100, SamplingParams(max_tokens=9, seed=0))
        served = cluster.spawn(cluster.generate(request))
        jumped = 0
        while not served.done():
            await asyncio.sleep(0.01)
            if len(cluster.poisoned) > jumped:
                jumped = len(cluster.poisoned)
                await asyncio.sleep(0.05)  # their session has broken
                decode.node.offset_s += 5.0
        assert isinstance(served.exception(), PoisonRequest)
        await cluster.close()
        return jumped

    assert run(main()) == 2


async def test_a_chore_that_begins_while_the_others_are_stopped_is_stopped_too() -> None:
    """An offer that was cancelled let the next one begin, which outlived its worker."""
    chores = Chores()

    async def waits() -> None:
        await asyncio.sleep(60.0)

    async def begins_another() -> None:
        try:
            await waits()
        finally:
            chores.spawn(waits(), "another")

    chores.spawn(begins_another(), "one")
    await asyncio.sleep(0)
    await chores.stop()
    assert len(asyncio.all_tasks()) == 1
    late = chores.spawn(waits(), "too late")
    await asyncio.wait([late])
    assert late.cancelled()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_drains_costs_a_request_no_retry(name: str) -> None:
    """Routers hear of it a moment later; what they send meanwhile is refused, and nothing has begun."""

    async def main() -> list[str]:
        cluster = SimCluster(1, prefill=2, decode=2)
        await cluster.start()
        for router in cluster.routers:
            router.saga._budget.level = router.saga._budget.most = 0.0
        cluster.alive[name].worker.tier.draining = True
        prompts = [prompt_of(Random(n), 100) for n in range(8)]
        params = SamplingParams(max_tokens=5, seed=0)
        return await asyncio.gather(*(finish(cluster, f"r{n}", prompt, params) for n, prompt in enumerate(prompts)))

    assert set(run(main())) == {"right"}


def test_a_worker_killed_by_what_another_handed_back_counts() -> None:
    """The decode worker left and handed it back, while it was killing the prefill worker: nobody had noted that one."""

    async def main() -> None:
        cluster = SimCluster(1, prefill=4, decode=2)
        await cluster.start()
        deadly = request_of("r", [POISON] + [1] * 100, SamplingParams(max_tokens=9, seed=0))
        asked = cluster.spawn(cluster.generate(deadly))
        while not cluster.poisoned:
            await asyncio.sleep(0.001)
        router = cluster.routers[0]
        (inbox,) = router.workers.running(cluster.poisoned[0])
        leaver = inbox.workers[0]
        router.workers.on_failed(leaver, RequestFailed("r", inbox.attempt, WorkerDraining.code, "it leaves"))
        with pytest.raises(PoisonRequest):
            await asked
        assert len(cluster.poisoned) == 2
        await cluster.close()

    run(main())
