"""Two nodes and a head that keeps its state in Redis: the GCS dies and comes back, a node is drained, under load."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes.answers import Answer
from tests.ray.cluster import RayCluster, ray_cluster
from tests.ray.load import STEADY, asking
from tests.ray.test_deployed import until
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(300)

Right = dict[str, Answer]

AWAY_S = 8.0
STAYS = {"label_selector": {"part": "stays"}}
RATHER = {"prefer": {"part": "goes"}}  # near each other, as long as that is possible
BOTH: dict[str, Any] = {
    "router": STAYS,
    "prefill": {**RATHER, "min": 2, "max": 2, "drain_s": 10},
    "decode": {**RATHER, "min": 2, "max": 2, "drain_s": 15},
}


@pytest.fixture(scope="module")
def nodes(redis: RedisServer, right: Right) -> Iterator[RayCluster]:
    """A head without room for workers, and two nodes, each with room for all of them."""
    state = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}", "RAY_external_storage_namespace": "two-nodes"}
    with ray_cluster(redis.url, state) as cluster:
        cluster.start_head(cpus=0, watched=False)
        cluster.start_node("stays", cpus=6, labels="part=stays")
        cluster.start_node("goes", cpus=6, labels="part=goes")
        cluster.deploy(cluster.spec(**BOTH))
        yield cluster


async def test_the_loss_of_the_gcs_stops_nothing_and_its_return_is_no_outage(nodes: RayCluster, right: Right) -> None:
    before = {tier: set(nodes.workers(tier)) for tier in ("router", "prefill", "decode")}
    async with asking(nodes.url, STEADY, right, at_once=3) as tally:
        start = await asyncio.to_thread(nodes.kill_gcs)
        answered = tally.right
        await asyncio.sleep(AWAY_S)
        assert tally.right > answered
        start()
        await asyncio.to_thread(nodes.deploy, nodes.spec(**BOTH))
        answered = tally.right
        await until(nodes, "answers after its return", lambda: tally.right > answered + 3)
    tally.assert_whole()
    assert {tier: set(nodes.workers(tier)) for tier in before} == before


async def test_a_node_that_is_told_to_go_hands_its_work_on(nodes: RayCluster, right: Right) -> None:
    goes = {process.pid for process in nodes.of_node("goes")}
    for tier in ("prefill", "decode"):
        assert set(nodes.workers(tier)) <= goes, "all are where they would rather be"
    async with asking(nodes.url, STEADY, right, at_once=3) as tally:
        await asyncio.sleep(1.0)
        nodes.nodes["goes"].send_signal(signal.SIGTERM)

        def is_moved() -> bool:
            now = [set(nodes.workers(tier)) for tier in ("prefill", "decode")]
            return all(len(pids) == 2 and not pids & goes for pids in now)

        await until(nodes, "every worker is on the other node", is_moved, 90.0)
        await asyncio.sleep(2.0)
    tally.assert_whole()
    await until(nodes, "the node has ended", lambda: nodes.nodes["goes"].poll() is not None, 130.0)
