"""A Ray cluster of a test's own: nodes as `ray start` makes them, what is deployed on it, and its end.

Everything is found by the folder that it runs in, as in tests/processes; and nobody else's cluster is touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.processes.cluster import MODEL, ROOT, free_port
from tests.servers import need

START_S = 60.0
DEPLOY_S = 150.0
PATIENCE_S = 60.0
OBJECT_STORE_BYTES = 80_000_000  # Ray's least is 75 MiB
WORKER = {"dtype": "float32", "pages": 512, "max_context": 2048, "threads": 1, "transport": "shm"}


class RayCluster:
    """Nodes of one Ray cluster on this machine. `registry`: address of the Redis for Baton's workers."""

    def __init__(self, registry: str, more_env: Mapping[str, str] | None = None) -> None:
        need("ray")
        self.folder = Path(tempfile.mkdtemp(prefix="br-", dir="/tmp"))  # short: it is a part of socket addresses
        self.registry = registry
        self.gcs_port = free_port()
        self.port = free_port()  # of the router
        self.url = f"http://127.0.0.1:{self.port}"
        self.nodes: dict[str, psutil.Popen] = {}
        self._log = (self.folder / "nodes.log").open("ab")
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "100",  # a worker's start, then the longest drain: docs/cluster.md
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_raylet_start_wait_time_s": "90",
            **(more_env or {}),
        }

    # --- Ray's nodes -------------------------------------------------------------------------------------------

    def start_head(self, cpus: int, watched: bool = True) -> None:
        """`watched` False: the node does not end when one of its parts does."""
        flags = ["--head", f"--port={self.gcs_port}", f"--temp-dir={self.folder / 'ray'}", "--include-dashboard=false"]
        self._start_node("head", [*flags, "--disable-usage-stats"], cpus, "", watched)

    def start_node(self, name: str, cpus: int, labels: str = "") -> None:
        self._start_node(name, [f"--address=127.0.0.1:{self.gcs_port}"], cpus, labels)

    def _start_node(self, name: str, flags: list[str], cpus: int, labels: str, watched: bool = True) -> None:
        """`ray start` waits thirty seconds for its own parts, which a busy machine may exceed: tried twice."""
        size = [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--node-ip-address=127.0.0.1"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *size, *flags]
        command += ["--block"] if watched else []
        for attempt in (1, 2):
            began = len(self.said())
            self.nodes[name] = node = psutil.Popen(
                [*command, f"--labels={labels}"] if labels else command,
                cwd=self.folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
            ends_s = time.monotonic() + START_S
            while node.poll() is None and time.monotonic() < ends_s:
                if "Ray runtime started" in self.said()[began:]:
                    break
                time.sleep(0.05)
            if "Ray runtime started" in self.said()[began:]:
                return
            self.kill_node(name)
            assert attempt == 1, f"no Ray node {name}:\n{self.said()[-4000:]}"

    def of_node(self, name: str) -> list[psutil.Process]:
        """A node's processes, those that Baton started on it included."""
        with suppress(psutil.Error):
            return [self.nodes[name], *self.nodes[name].children(recursive=True)]
        return []

    def kill_gcs(self) -> Callable[[], None]:
        """As when its machine loses power; what is returned starts it again, at the same port."""
        (gcs,) = [process for process in self.processes() if "gcs_server" in _title(process)]
        command, environment = gcs.cmdline(), gcs.environ()
        gcs.kill()
        psutil.wait_procs([gcs], 10)

        def start() -> None:
            self.nodes["gcs"] = psutil.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )

        return start

    def kill_node(self, name: str) -> None:
        """As when its machine loses power."""
        processes = self.of_node(name)
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        self.nodes.pop(name).wait(10)
        psutil.wait_procs(processes, 10)

    def said(self) -> str:
        return (self.folder / "nodes.log").read_text(errors="replace")

    # --- what is deployed --------------------------------------------------------------------------------------

    def spec(self, **tiers: Mapping[str, Any]) -> dict[str, Any]:
        """A small cluster file; the tiers' values go over what is given here."""
        small: dict[str, dict[str, Any]] = {
            "router": {"http_host": "127.0.0.1", "http_port": self.port, "drain_s": 5, "flags": {"max_context": 2048}},
            "prefill": {"max": 1, "drain_s": 10, "flags": WORKER},
            "decode": {"max": 1, "drain_s": 20, "flags": WORKER},
        }
        for name, tier in tiers.items():
            flags = {**small[name]["flags"], **tier.get("flags", {})}
            small[name] = {**small[name], **tier, "flags": flags}
        return {
            "model": {"path": str(MODEL)},
            "registry": {"url": self.registry},
            "security": {"insecure": True},
            **small,
        }

    def baton(self, *words: str, within_s: float = DEPLOY_S) -> subprocess.CompletedProcess[str]:
        """A command of Baton, run on a node of this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "baton", *words],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=within_s,
        )

    def deploy(self, spec: Mapping[str, Any]) -> str:
        """What it has printed."""
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(dict(spec)))
        done = self.baton("deploy", str(path), "--address", self.address, "--wait-s", str(DEPLOY_S - 20))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.last_words()}"
        return done.stdout

    def undeploy(self) -> str:
        done = self.baton("undeploy", "--address", self.address)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs_port}"

    def workers(self, tier: str) -> dict[int, psutil.Process]:
        """The processes that serve, by pid, of a tier ('router', 'prefill', 'decode')."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                if _title(process).startswith(f"baton-{tier}-"):
                    found[process.pid] = process
        return found

    def begun(self, tier: str) -> int:
        """How many replicas Serve's controller has decided to start: their processes take long."""
        logs = (self.folder / "ray").glob("session_latest/logs/serve/controller_*.log")
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        decisions = (re.search(rf"Adding (\d+) replicas? to Deployment\(name='{tier}'", line) for line in lines)
        return sum(int(decision[1]) for decision in decisions if decision)

    def wait_until(self, what: str, holds: Callable[[], bool], within_s: float = PATIENCE_S) -> float:
        """Seconds that it took."""
        began_s = time.monotonic()
        while not holds():
            assert time.monotonic() - began_s < within_s, f"{within_s:.0f} s, and not yet: {what}\n{self.last_words()}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def last_words(self) -> str:
        """Of Serve's controller, and of each replica."""
        logs = sorted((self.folder / "ray").glob("session_latest/logs/serve/*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    # --- its end -----------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster that is alive, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                in_here = process.cwd() == str(self.folder) or str(self.folder) in " ".join(process.cmdline())
                if in_here and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
        return found

    def assert_nothing_left(self) -> None:
        """Of what was deployed, once that has been taken down: Ray's own processes stay."""
        for tier in ("router", "prefill", "decode"):
            self.wait_until(f"no {tier} is left", lambda tier=tier: not self.workers(tier))  # type: ignore[misc]

    def destroy(self) -> None:
        """Whatever has happened, leave no process and no folder behind."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for node in self.nodes.values():
            node.wait(PATIENCE_S)
        psutil.wait_procs(self.processes(), PATIENCE_S)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ray_cluster(registry: str, more_env: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    cluster = RayCluster(registry, more_env)
    try:
        yield cluster
    finally:
        cluster.destroy()


def _title(process: psutil.Process) -> str:
    """What `ps` shows; empty for one that just ends."""
    return "".join(process.cmdline()[:1])
