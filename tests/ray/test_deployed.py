"""A deployed cluster under load: it answers as a server without Ray, and scales, heals and updates without a loss.

One cluster, changed from test to test as its operator would change it: the tests run in the order of the file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest

from core.registry.decisions import read
from tests.processes.answers import Answer
from tests.ray.cluster import RayCluster
from tests.ray.load import ANSWERS, PROMPTS, SHORT, STEADY, asking

pytestmark = pytest.mark.timeout(300)

Right = dict[str, Answer]

QUICK = {"window_s": 6.0, "pause_s": 1.0}
DECIDED_S = 5.0  # a burst is answered by a decision
DETECTED_S = 3.0
SUCCESS_S = 10.0

ELASTIC = {
    "prefill": {"max": 2, "steady": QUICK, "target": {"first_token_s": 0.1, "start_s": 2.0}},
    "decode": {"max": 2, "steady": QUICK, "target": {"token_gap_s": 5.0, "full_share": 0.6}, "flags": {"pages": 700}},
}
DOUBLE: dict[str, dict[str, Any]] = {"prefill": {"min": 2, "max": 2}, "decode": {"min": 2, "max": 2}}


async def until(cluster: RayCluster, what: str, holds: Callable[[], bool], within_s: float = 60.0) -> float:
    return await asyncio.to_thread(cluster.wait_until, what, holds, within_s)


async def desired(cluster: RayCluster) -> dict[str, int]:
    from core.registry.redis_store import open_store

    store = open_store(cluster.registry)
    try:
        return {name: decision.desired for name, decision in (await read(store)).items()}
    finally:
        await store.close()


async def test_it_answers_what_a_server_without_ray_answers(cluster: RayCluster, right: Right) -> None:
    said = await asyncio.to_thread(cluster.deploy, cluster.spec(**ELASTIC))
    assert f"ready: {cluster.url}" in said
    request = SHORT[0]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        done = await client.completions.create(
            model=request["model"], prompt=request["prompt"], max_tokens=24, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    assert done.choices[0].text == right[str(request)].texts[0]
    async with asking(cluster.url, SHORT, right, at_once=3) as tally:
        await asyncio.sleep(2.0)
    tally.assert_whole(len(SHORT))


@pytest.mark.parametrize(
    ("tier", "other", "bodies", "at_once"), [("prefill", "decode", PROMPTS, 4), ("decode", "prefill", ANSWERS, 5)]
)
async def test_a_tier_scales_up_and_down_by_itself(
    cluster: RayCluster, right: Right, tier: str, other: str, bodies: list[dict[str, Any]], at_once: int
) -> None:
    assert len(cluster.workers(tier)) == len(cluster.workers(other)) == 1
    began_s = time.monotonic()
    async with asking(cluster.url, bodies, right, at_once) as tally:
        while (await desired(cluster)).get(tier) != 2:
            assert time.monotonic() - began_s < DECIDED_S, f"no decision: {cluster.last_words()}"
            await asyncio.sleep(0.1)
        await until(cluster, f"two {tier} workers", lambda: len(cluster.workers(tier)) == 2)
        await asyncio.sleep(1.0)
        assert len(cluster.workers(other)) == 1
    async with asking(cluster.url, SHORT, right, at_once=1) as rest:
        await until(cluster, f"one {tier} worker", lambda: len(cluster.workers(tier)) == 1)
    tally.assert_whole()
    rest.assert_whole()


async def test_killed_replicas_and_processes_are_replaced(cluster: RayCluster, right: Right) -> None:
    await asyncio.to_thread(cluster.deploy, cluster.spec(**DOUBLE))
    async with asking(cluster.url, STEADY, right, at_once=3) as tally:
        for tier, of_actor in (("prefill", True), ("decode", True), ("prefill", False), ("decode", False)):
            await asyncio.sleep(1.0)
            child = next(iter(cluster.workers(tier).values()))
            begun, right_before = cluster.begun(tier), tally.right
            (_actor_of(child) if of_actor else child).kill()

            def is_seen(tier: str = tier, begun: int = begun) -> bool:
                return cluster.begun(tier) > begun

            await until(cluster, f"another {tier} is to be started", is_seen, DETECTED_S)
            await until(cluster, "a success", lambda n=right_before: tally.right > n, SUCCESS_S)  # type: ignore[misc]
            await asyncio.to_thread(cluster.deploy, cluster.spec(**DOUBLE))  # changes nothing; ends when all is whole
            assert len(cluster.workers(tier)) == 2
    tally.assert_whole()
    assert tally.gap_s < SUCCESS_S


async def test_an_update_restarts_one_tier_and_loses_nothing(cluster: RayCluster, right: Right) -> None:
    await asyncio.to_thread(cluster.deploy, cluster.spec(**DOUBLE))
    routers, prefill, decode = (set(cluster.workers(tier)) for tier in ("router", "prefill", "decode"))
    changed = {**DOUBLE, "decode": {**DOUBLE["decode"], "flags": {"pages": 640}}}
    async with asking(cluster.url, STEADY, right, at_once=3) as tally:
        await asyncio.to_thread(cluster.deploy, cluster.spec(**changed))
        await until(cluster, "the old workers are gone", lambda: not set(cluster.workers("decode")) & decode)
        await asyncio.sleep(1.0)
    tally.assert_whole()
    assert set(cluster.workers("router")) == routers
    assert set(cluster.workers("prefill")) == prefill
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        workers = (await client.get("/cluster")).json()["workers"]
    assert {worker["pages_total"] for worker in workers if worker["tier"] == "decode"} == {640}


async def test_what_is_taken_down_is_gone(cluster: RayCluster) -> None:
    assert "gone" in await asyncio.to_thread(cluster.undeploy)
    await asyncio.to_thread(cluster.assert_nothing_left)
    assert "nothing is deployed" in await asyncio.to_thread(cluster.undeploy)


def _actor_of(child: psutil.Process) -> psutil.Process:
    actor = child.parent()
    assert actor is not None
    return actor
