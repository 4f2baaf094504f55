"""`baton status` where all meet in a real Redis: decisions, the other routers, a registry that goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.registry.decisions import Decision, publish
from core.registry.redis_store import open_store
from tests.processes.cluster import PATIENCE_S, ROOT
from tests.processes.fleet import Fleet, fleet
from tests.redis_server import RedisServer, redis_server

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def two_routers(redis: RedisServer) -> Iterator[Fleet]:
    with fleet(redis.url) as found:
        found.worker("p0", "prefill")
        found.worker("d0", "decode")
        found.router("r0")
        found.router("r1")
        found.until_ready("p0", "d0")
        yield found


def status(url: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "baton", "status", url, "--json"]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd="/", capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def metrics(url: str) -> dict[tuple[str, ...], float]:
    """The router's series of tiers and registry: name, then label values by label."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(("baton:tier_", "baton:registry_up"))
    }


async def decide(redis: RedisServer, desired: int) -> None:
    store = open_store(redis.url, "baton")
    try:
        await publish(store, Decision("decode", desired, 1, f"{desired} workers' worth of pages"))
    finally:
        await store.close()


def test_a_registry_that_goes_away_is_said_until_it_is_back(two_routers: Fleet, redis: RedisServer) -> None:
    redis.signal(signal.SIGSTOP)
    try:
        two_routers.until("it is missed", lambda: not two_routers.view(two_routers.urls[0])["registry"]["up"])
        code, view = status(two_routers.urls[0])
        assert code == 1 and [finding["where"] for finding in view["findings"]] == [["registry"]]
        assert {worker["state"] for worker in view["workers"]} == {"ready"}, "their sessions say that they live"
        assert metrics(two_routers.urls[0])[("baton:registry_up",)] == 0
    finally:
        redis.signal(signal.SIGCONT)
    for url in two_routers.urls:  # each asks again in its own time
        two_routers.until(f"it is back at {url}", lambda url=url: status(url)[0] == 0)  # type: ignore[misc]


async def test_every_router_tells_what_was_decided_and_who_the_others_are(
    two_routers: Fleet, redis: RedisServer
) -> None:
    for url, me, other in ((*two_routers.urls[:1], "r0", "r1"), (*two_routers.urls[1:], "r1", "r0")):
        two_routers.until(f"{me} sees {other}", lambda url=url: len(two_routers.view(url)["routers"]) == 2)  # type: ignore[misc]
        code, view = status(url)
        assert code == 0 and view["registry"]["up"] and view["registry"]["age_s"] < 10
        assert [router["name"] for router in view["routers"]] == [me, other]
        assert view["routers"][1]["url"] in two_routers.urls
    await decide(redis, 1)
    two_routers.until("the decision is read", lambda: _desired(two_routers) == [1, 1])
    await decide(redis, 3)
    two_routers.until("the next one is read", lambda: _desired(two_routers) == [3, 3])
    code, view = status(two_routers.urls[1])
    assert code == 1 and [finding["what"] for finding in view["findings"]] == ["has 1 of 3 workers ready"]
    decode = next(tier for tier in view["tiers"] if tier["tier"] == "decode")
    assert decode["reason"] == "3 workers' worth of pages"
    found = metrics(two_routers.urls[1])
    assert found["baton:tier_desired_workers", "decode"] == 3
    assert found["baton:tier_decisions_total", "up", "decode"] == 1
    assert found["baton:tier_decisions_total", "down", "decode"] == 0
    assert found["baton:tier_workers", "ready", "decode"] == found["baton:tier_workers", "ready", "prefill"] == 1


def _desired(fleet: Fleet) -> list[int | None]:
    views = [fleet.view(url) for url in fleet.urls]
    return [tier["desired"] for view in views for tier in view["tiers"] if tier["tier"] == "decode"]
