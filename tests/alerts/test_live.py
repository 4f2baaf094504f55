"""A real Baton under a real Prometheus: the right alert reaches the webhook and no other, and none without a fault.

Also what only a running Baton can tell: that the metrics that rules, dashboard and documents name are there.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.alerts.monitoring import Monitoring, monitoring, wait_until
from tests.alerts.rules import RECORDED, ROOT, RUNBOOKS, dashboard_expressions, names, rules
from tests.processes.cluster import Cluster, started
from tests.redis_server import RedisServer, redis_server

pytestmark = [pytest.mark.timeout(300)]
LONG = "the cat sat on the mat. " * 60  # more tokens than a decode worker prefills itself
DOCUMENT = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([\w:]+)` \| (\w+) \| (.*?) \| .+ \|$", re.MULTILINE)
UNSEEN = {"baton:tier_desired_workers", "baton:path_fallbacks_total"}  # families without a series: nothing has scaled


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as server:
        yield server


@pytest.fixture
def cluster(redis: RedisServer) -> Iterator[Cluster]:
    with started("--prefill", "2", "--decode", "2", "--registry", redis.url) as cluster:
        yield cluster


def ask(cluster: Cluster, number: int = 0) -> None:
    body = {"model": "baton-tiny", "prompt": f"{number} {LONG}", "max_tokens": 4}
    httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()


def test_the_right_alert_reaches_the_webhook_and_no_other(cluster: Cluster, redis: RedisServer, tmp_path: Path) -> None:
    with monitoring(tmp_path, f"127.0.0.1:{cluster.port}") as watch:
        wait_until("a scrape", lambda: bool(watch.query("baton:worker_info")))
        wait_until("what was absent before it is forgotten", lambda: not watch.active())
        watch.receiver.alerts.clear()
        _stays_quiet(cluster, watch)
        redis.stop()
        wait_until("the registry's alert", lambda: "BatonRegistryDown" in watch.receiver.names())
        time.sleep(3)
        assert watch.receiver.names() == {"BatonRegistryDown"}
        redis.start()
        wait_until("it is over", lambda: "BatonRegistryDown" not in watch.active())
        watch.receiver.alerts.clear()
        _lose_the_decode_workers(cluster)
        wait_until("the tier's alert", lambda: "BatonTierEmpty" in watch.receiver.names())
        time.sleep(3)
        assert watch.receiver.names() == {"BatonTierEmpty"}
        (alert,) = (a for a in watch.receiver.alerts if a["status"] == "firing")
        assert alert["labels"]["tier"] == "decode"
        assert alert["annotations"]["description"] == "0 workers of the decode tier are ready."
        assert (ROOT / alert["annotations"]["runbook_url"]).is_file()
        assert watch.unhealthy_rules() == []


def _stays_quiet(cluster: Cluster, watch: Monitoring) -> None:
    """Idle, with requests, and idle again: each for longer than any `for:` but the slowest."""
    for requests in (0, 10, 0):
        for number in range(requests):
            ask(cluster, number)
        time.sleep(6)
        assert watch.receiver.names() == set()
    assert not [name for name, state in watch.active().items() if state == "firing"]
    assert watch.query(RECORDED + "pair_handoffs:rate5m"), "hand-offs were seen"


def _lose_the_decode_workers(cluster: Cluster) -> None:
    """For good: a launcher that is stopped starts nothing again."""
    cluster.launcher.send_signal(signal.SIGSTOP)
    for name in ("decode-0", "decode-1"):
        cluster.send(name, signal.SIGKILL)


def live(cluster: Cluster) -> tuple[set[str], dict[str, tuple[str, set[str]]]]:
    """The names of all samples, and by family its type and own labels."""
    samples, families = set(), {}
    for family in text_string_to_metric_families(httpx.get(f"{cluster.url}/metrics", timeout=10).text):
        samples |= {sample.name for sample in family.samples}
        if family.name.endswith("_created"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"le", "model_name", "engine"}
        name = family.name + ("_total" if family.type == "counter" else "")
        families[name] = (family.type, labels)
    return samples, families


def test_what_rules_dashboard_and_documents_name_is_there(cluster: Cluster) -> None:
    for number in range(4):
        ask(cluster, number)
    samples, _ = live(cluster)
    expressions = [rule["expr"] for rule in rules()] + dashboard_expressions()
    for page in RUNBOOKS.glob("*.md"):
        expressions += re.findall(r"```promql\n(.+?)\n```", page.read_text(), re.DOTALL)
    named = {name for expr in expressions for name in names(expr) if not name.startswith(RECORDED)} - {"up"}
    assert named - samples - UNSEEN == set()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for expr in expressions for name in names(expr) if name.startswith(RECORDED)} <= recorded


def test_the_table_of_metrics_is_whole_and_true(cluster: Cluster) -> None:
    for number in range(4):
        ask(cluster, number)
    _, shown = live(cluster)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(DOCUMENT.read_text())
    }
    assert set(documented) == set(shown)
    wrong = {name: (documented[name], known) for name, known in shown.items() if known != documented[name]}
    assert set(wrong) == UNSEEN
