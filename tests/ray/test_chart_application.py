"""The application that the Helm chart renders is handed to Ray by the call that KubeRay makes, and answers.

Ray's head has the variables of the chart's head pod that name Grafana, so that its dashboard shows Baton's in a frame.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from tests.chart import tools
from tests.chart.render import ROOT, Rendered, environment, render_values
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


class Grafana(BaseHTTPRequestHandler):
    """As much of it as Ray's dashboard asks for before it shows a frame."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"database": "ok"}).encode())

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def grafana() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Grafana)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rendered(redis: RedisServer, grafana: str) -> Rendered:
    small = {"min": 1, "max": 1, "surgePercent": 0, "drainSeconds": 10}
    return render_values(
        tools.helm(max(tools.HELM)),
        model={"path": str(MODEL)},
        security={"insecure": True},
        ray={"auth": {"mode": "disabled"}, "gcsFaultTolerance": {"enabled": False}},
        redis={"mode": "external", "external": {"url": redis.url, "passwordRequired": False}},
        router={**small, "flags": {"max_context": 2048}},
        prefill={**small, "flags": WORKER},
        decode={**small, "flags": WORKER},
        monitoring={"grafanaHost": grafana},
    )


@pytest.fixture
def cluster(redis: RedisServer, dashboard: int, rendered: Rendered) -> Iterator[RayCluster]:
    """One node with the resources of all groups of pods, and the dashboard that takes applications."""
    variables = environment(rendered.pod("head"))
    to_grafana = {name: value for name, value in variables.items() if name.startswith("RAY_GRAFANA")}
    with ray_cluster(redis.url, to_grafana) as one:
        flags = ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
        ports = [f"--port={one.gcs_port}", f"--dashboard-agent-listen-port={free_port()}"]
        resources = '--resources={"baton_router": 1, "baton_prefill": 1, "baton_decode": 1}'
        one._start_node("head", ["--head", *ports, f"--temp-dir={one.folder / 'ray'}", *flags, resources], 16, "")
        yield one


def application(rendered: Rendered, cluster: RayCluster) -> dict[str, Any]:
    """As rendered, but for the ports: a pod has all of its own, this machine has not."""
    config = rendered.serve
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    config["applications"][0]["args"]["router"] |= {"http_host": "127.0.0.1", "http_port": cluster.port}
    return config


def test_it_is_deployed_as_kuberay_does_and_answers(
    cluster: RayCluster, rendered: Rendered, dashboard: int, right: dict[str, Answer], grafana: str
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{dashboard}", timeout=30.0) as ray:
        ray.put(APPLICATIONS, json=application(rendered, cluster)).raise_for_status()
        until_s = time.monotonic() + DEPLOY_S
        while (found := ray.get(APPLICATIONS).json()["applications"]["baton"])["status"] != "RUNNING":
            assert found["status"] != "DEPLOY_FAILED" and time.monotonic() < until_s, (found, cluster.last_words())
            time.sleep(0.2)
        assert set(found["deployments"]) == {"router", "prefill", "decode"}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=SHORT[0], timeout=60.0).raise_for_status().json()
        assert answer["choices"][0]["text"] == right[str(SHORT[0])].texts[0]
        frames = ray.get("/api/grafana_health").raise_for_status().json()["data"]
        assert frames["grafanaHost"] == grafana
        assert frames["dashboardUids"]["data"] == json.loads((ROOT / "deploy/grafana/baton.json").read_text())["uid"]
        ray.delete(APPLICATIONS).raise_for_status()
    cluster.assert_nothing_left()
