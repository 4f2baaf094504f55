"""A real Prometheus and a real Alertmanager around a running router, and the webhook that Alertmanager calls.

An hour is a minute here: the rules' windows and `for:` are shortened sixty times by `sixty_times_faster`, pages are
scraped every second, and rules evaluated twice. Thresholds stay as they are, but for the
SLOs: how fast this machine is at the moment is not what is tested.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.alerts.rules import RULES, patient, sixty_times_faster
from tests.processes.cluster import free_port
from tests.servers import need

STEP = "500ms"
SCRAPE = "1s"  # a busy machine answers within that
START_S = 60.0


class Receiver:
    """What has come to the webhook."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def names(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.alerts if alert["status"] == "firing"}


class Monitoring:
    def __init__(self, prometheus: str, receiver: Receiver) -> None:
        self._url = prometheus
        self.receiver = receiver

    def query(self, expr: str) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self._url}/api/v1/query", params={"query": expr}, timeout=10)
        found: list[dict[str, Any]] = reply.raise_for_status().json()["data"]["result"]
        return found

    def active(self) -> dict[str, str]:
        """Alerts that fire or are about to, with their state."""
        found = httpx.get(f"{self._url}/api/v1/alerts", timeout=10).raise_for_status().json()["data"]["alerts"]
        return {alert["labels"]["alertname"]: alert["state"] for alert in found}

    def unhealthy_rules(self) -> list[str]:
        groups = httpx.get(f"{self._url}/api/v1/rules", timeout=10).raise_for_status().json()["data"]["groups"]
        return [
            f"{rule['name']}: {rule.get('lastError')}" for g in groups for rule in g["rules"] if rule["health"] == "err"
        ]


def wait_until(what: str, holds: Callable[[], bool], within_s: float = START_S) -> None:
    ends_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends_s, f"{within_s:.0f} s, and not yet: {what}"
        time.sleep(0.2)


@contextmanager
def _webhook(receiver: Receiver) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.alerts += json.loads(body)["alerts"]
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _process(command: list[str], log: Path, ready_url: str) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(ready_url, timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(f"{command[0]} is ready", ready)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextmanager
def monitoring(folder: Path, router: str) -> Iterator[Monitoring]:
    """Scrapes `router` (host:port). Skips where the programs are absent: see tests.servers."""
    prometheus, alertmanager = need("prometheus"), need("alertmanager")
    receiver, ports = Receiver(), (free_port(), free_port())
    (folder / "rules.yaml").write_text(patient(sixty_times_faster(RULES.read_text())))
    route = {
        "receiver": "test",
        "group_by": ["..."],
        "group_wait": "0s",
        "group_interval": "1s",
        "repeat_interval": "1h",
    }
    with ExitStack() as stack:
        hook = {"url": stack.enter_context(_webhook(receiver)), "send_resolved": True}
        routes = {"route": route, "receivers": [{"name": "test", "webhook_configs": [hook]}]}
        (folder / "alertmanager.yaml").write_text(yaml.safe_dump(routes))
        scrape = {"job_name": "baton", "static_configs": [{"targets": [router]}]}
        peers = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports[1]}"]}]}]}
        config = {
            "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": STEP},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [scrape],
            "alerting": peers,
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        flags = [
            f"--config.file={folder}/alertmanager.yaml",
            f"--storage.path={folder}/am",
            "--cluster.listen-address=",
        ]
        command = [alertmanager, *flags, f"--web.listen-address=127.0.0.1:{ports[1]}"]
        stack.enter_context(_process(command, folder / "am.log", f"http://127.0.0.1:{ports[1]}/-/ready"))
        flags = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/tsdb"]
        command = [prometheus, *flags, f"--web.listen-address=127.0.0.1:{ports[0]}"]
        url = f"http://127.0.0.1:{ports[0]}"
        stack.enter_context(_process(command, folder / "prometheus.log", f"{url}/-/ready"))
        yield Monitoring(url, receiver)
