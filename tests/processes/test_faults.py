"""Workers that are killed or stopped while they hold requests in every state.

With another worker of the tier every client gets every token; with none it may get one clear error instead.
Afterwards each page is accounted for, and the cluster serves on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest

from tests.processes.answers import Answer, ask, assert_right, assert_right_or_refused
from tests.processes.cluster import PATIENCE_S, Cluster, serving
from tests.processes.load import ENDLESS, LONG, STREAMED, Load, references, refill_retries, tokens_of

SILENT_S = 4.0  # longer than a router waits for a worker's word

TIERS = pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
ALONE = pytest.mark.parametrize("per_tier", [1], ids=["alone"], indirect=True)

References = dict[str, Answer]


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "with-another"])
def per_tier(request: pytest.FixtureRequest) -> int:
    """Workers of each tier."""
    return int(request.param)


@pytest.fixture(scope="module")
def cluster(per_tier: int) -> Iterator[Cluster]:
    """Small steps: a long prompt is prefilled for as long as the test needs to find it at that."""
    flags = ("--prefill", str(per_tier), "--decode", str(per_tier), "--step-tokens", "32")
    with serving(*flags, workers=2 * per_tier) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def right(cluster: Cluster) -> References:
    """The answers of the cluster before anything has happened to it."""
    return asyncio.run(references(cluster))


@asynccontextmanager
async def loaded(cluster: Cluster, right: References, salt: str) -> AsyncIterator[Load]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as client:
        await refill_retries(client)
        load = Load(client, salt, right)
        try:
            yield load
        finally:
            await load.leave()


async def busy_in_every_state(cluster: Cluster, load: Load, victim: str, per_tier: int) -> None:
    """Return when the victim decodes in mid-stream, or prefills one prompt while others wait."""
    await tokens_of(load.send(STREAMED * per_tier), 5)
    load.send(LONG * per_tier)

    def is_busy() -> bool:
        streaming = cluster.metric("baton:handoffs_in_flight", "state")[victim]["streaming"]
        if victim.startswith("prefill"):
            return streaming >= 1 and cluster.metric("vllm:num_requests_waiting")[victim][victim] >= 1
        return streaming >= 1 and cluster.metric("vllm:num_requests_running")[victim][victim] >= 1

    await asyncio.to_thread(cluster.wait_until, f"{victim} has requests in every state", is_busy)


async def judge(load: Load, per_tier: int) -> None:
    """All have ended, and well."""
    for answer, reference in await load.answers():
        if per_tier > 1:
            assert_right(answer, reference)
        else:
            assert_right_or_refused(answer, reference)


async def serves_on(cluster: Cluster, right: References, per_tier: int, salt: str) -> None:
    """Every worker is there, holds nothing, and a hand-off gives the right tokens."""
    await asyncio.to_thread(cluster.quiesce, 2 * per_tier)
    await asyncio.to_thread(cluster.wait_until, "it is healthy", cluster.is_healthy)
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        answer = await ask(client, {**STREAMED[1], "cache_salt": salt}, Answer())
        assert_right(answer, right[str(STREAMED[1])])


@TIERS
async def test_a_worker_is_killed(cluster: Cluster, right: References, per_tier: int, victim: str) -> None:
    retries = cluster.total("baton:retries_total")
    async with loaded(cluster, right, f"killed {victim}") as load:
        await busy_in_every_state(cluster, load, victim, per_tier)
        process = cluster.send(victim, signal.SIGKILL)
        await judge(load, per_tier)
    assert cluster.total("baton:retries_total") > retries, "the kill met nobody"
    cluster.wait_until(f"{victim} has been started again", lambda: cluster.replaced(process, victim))
    await serves_on(cluster, right, per_tier, f"after killed {victim}")


@TIERS
async def test_a_worker_is_killed_with_the_first_token(
    cluster: Cluster, right: References, per_tier: int, victim: str
) -> None:
    """The source has sealed, the receiver commits: between these two a hand-off has two owners."""
    process = cluster.process(victim)
    async with loaded(cluster, right, f"sealed {victim}") as load:
        await tokens_of(load.send([STREAMED[1]]), 1)
        process.kill()
        await judge(load, per_tier)
    cluster.wait_until(f"{victim} has been started again", lambda: cluster.replaced(process, victim))
    await serves_on(cluster, right, per_tier, f"after sealed {victim}")


@TIERS
async def test_a_worker_is_stopped_for_long(cluster: Cluster, right: References, per_tier: int, victim: str) -> None:
    """Alone, it is missed until it goes on; with another, nobody waits for it."""
    retries = cluster.total("baton:retries_total")
    async with loaded(cluster, right, f"stopped {victim}") as load:
        await busy_in_every_state(cluster, load, victim, per_tier)
        process = cluster.send(victim, signal.SIGSTOP)
        try:
            if per_tier > 1:
                await judge(load, per_tier)
            else:
                await asyncio.sleep(SILENT_S)
        finally:
            process.send_signal(signal.SIGCONT)
        await judge(load, per_tier)
    assert cluster.total("baton:retries_total") > retries, "the stop met nobody"
    assert cluster.process(victim).pid == process.pid, "what is only stopped is not started again"
    await serves_on(cluster, right, per_tier, f"after stopped {victim}")


@ALONE
@TIERS
async def test_a_worker_that_is_stopped_for_a_moment_is_not_missed(
    cluster: Cluster, right: References, per_tier: int, victim: str
) -> None:
    retries = cluster.total("baton:retries_total")
    async with loaded(cluster, right, f"paused {victim}") as load:
        await busy_in_every_state(cluster, load, victim, per_tier)
        process = cluster.send(victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.5)
        finally:
            process.send_signal(signal.SIGCONT)
        for answer, reference in await load.answers():
            assert_right(answer, reference)
    assert cluster.total("baton:retries_total") == retries
    await serves_on(cluster, right, per_tier, f"after paused {victim}")


@asynccontextmanager
async def given_up(cluster: Cluster) -> AsyncIterator[Load]:
    """A load whose end is that somebody leaves: the workers must not go on with it to its own end."""
    nobody_knows = {str(request): Answer() for request in [ENDLESS, *STREAMED, *LONG]}
    async with loaded(cluster, nobody_knows, "given up") as load:
        await tokens_of(load.send([ENDLESS]), 5)
        await busy_in_every_state(cluster, load, "decode-0", per_tier=1)
        steps = cluster.metric("baton:step_seconds_count")["decode-0"]["decode-0"]
        yield load
    await asyncio.to_thread(cluster.quiesce, 2)
    more = cluster.metric("baton:step_seconds_count")["decode-0"]["decode-0"] - steps
    assert more < 0.9 * ENDLESS["max_tokens"], f"{more:.0f} more steps for nobody"


@ALONE
async def test_clients_leave_in_every_state(cluster: Cluster, right: References, per_tier: int) -> None:
    timed = {name: cluster.total(f"baton:cancel_to_reclaim_seconds_{name}") for name in ("count", "sum")}
    async with given_up(cluster) as load:
        await load.leave()
    taken = {name: cluster.total(f"baton:cancel_to_reclaim_seconds_{name}") - old for name, old in timed.items()}
    assert taken["count"] > 0 and taken["sum"] / taken["count"] < 2.0, f"a step or a chunk each: {taken}"
    await serves_on(cluster, right, per_tier, "after left")


@ALONE
async def test_the_router_is_killed(cluster: Cluster, right: References, per_tier: int) -> None:
    """The next one knows nothing of what the workers hold for it, and they let go of it."""
    async with given_up(cluster) as load:
        process = cluster.send("router", signal.SIGKILL)
        ended = await asyncio.gather(*(asked.task for asked in load.asked), return_exceptions=True)
        assert any(isinstance(end, httpx.HTTPError) for end in ended), ended
        is_back = partial(cluster.replaced, process, "router")
        await asyncio.to_thread(cluster.wait_until, "the router has been started again", is_back)
    await serves_on(cluster, right, per_tier, "after router")
