"""The application that the Helm chart renders is handed to Ray by the call that KubeRay makes, and answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.chart import tools
from tests.chart.render import render_values
from tests.processes.answers import Answer
from tests.processes.cluster import MODEL, free_port
from tests.ray.cluster import DEPLOY_S, WORKER, RayCluster, ray_cluster
from tests.ray.load import SHORT
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(300)

APPLICATIONS = "/api/serve/applications/"  # what the operator's client writes to, and reads


@pytest.fixture
def dashboard() -> int:
    return free_port()


@pytest.fixture
def cluster(redis: RedisServer, dashboard: int) -> Iterator[RayCluster]:
    """One node with the resources of all groups of pods, and the dashboard that takes applications."""
    with ray_cluster(redis.url) as one:
        flags = ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
        ports = [f"--port={one.gcs_port}", f"--dashboard-agent-listen-port={free_port()}"]
        resources = '--resources={"baton_router": 1, "baton_prefill": 1, "baton_decode": 1}'
        one._start_node("head", ["--head", *ports, f"--temp-dir={one.folder / 'ray'}", *flags, resources], 16, "")
        yield one


def application(cluster: RayCluster) -> dict[str, Any]:
    """As rendered, but for the ports: a pod has all of its own, this machine has not."""
    small = {"min": 1, "max": 1, "surgePercent": 0, "drainSeconds": 10}
    rendered = render_values(
        tools.helm(max(tools.HELM)),
        model={"path": str(MODEL)},
        security={"insecure": True},
        ray={"auth": {"mode": "disabled"}, "gcsFaultTolerance": {"enabled": False}},
        redis={"mode": "external", "external": {"url": cluster.registry, "passwordRequired": False}},
        router={**small, "flags": {"max_context": 2048}},
        prefill={**small, "flags": WORKER},
        decode={**small, "flags": WORKER},
    )
    config = rendered.serve
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    config["applications"][0]["args"]["router"] |= {"http_host": "127.0.0.1", "http_port": cluster.port}
    return config


def test_it_is_deployed_as_kuberay_does_and_answers(
    cluster: RayCluster, dashboard: int, right: dict[str, Answer]
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{dashboard}", timeout=30.0) as ray:
        ray.put(APPLICATIONS, json=application(cluster)).raise_for_status()
        until_s = time.monotonic() + DEPLOY_S
        while (found := ray.get(APPLICATIONS).json()["applications"]["baton"])["status"] != "RUNNING":
            assert found["status"] != "DEPLOY_FAILED" and time.monotonic() < until_s, (found, cluster.last_words())
            time.sleep(0.2)
        assert set(found["deployments"]) == {"router", "prefill", "decode"}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=SHORT[0], timeout=60.0).raise_for_status().json()
        assert answer["choices"][0]["text"] == right[str(SHORT[0])].texts[0]
        ray.delete(APPLICATIONS).raise_for_status()
    cluster.assert_nothing_left()
