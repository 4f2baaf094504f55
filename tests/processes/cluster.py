"""`baton serve` as a test sees it: started, asked for its metrics, its processes found by name, and gone at the end.

Everything that a cluster makes is found by the folder that it runs in: its processes have it as their working
directory, however they were orphaned, and its temporary files are put there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "baton-tiny"
START_S = 90.0  # a busy machine takes many times as long as a quiet one
PATIENCE_S = 60.0  # for what a quiet machine does in some seconds
STOP_S = 5.0  # what the product promises
PAGES = 1024
SMALL = ("--dtype", "float32", "--pages", str(PAGES), "--max-context", "2048", "--threads", "1")

Samples = dict[str, dict[str, float]]  # by worker, then by the value of the series' own label


class Cluster:
    """A running `baton serve`. `url` answers once `start` has returned."""

    def __init__(self, *flags: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))  # short: it is a part of socket addresses
        self._shm_before = set(os.listdir("/dev/shm"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log: list[str] = []
        self._ready = threading.Event()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._folder)}
        command = [sys.executable, "-m", "baton", "serve", str(MODEL), "--port", str(self.port), *SMALL, *flags]
        self.launcher = psutil.Popen(
            command,
            cwd=self._folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="cluster-log", daemon=True)
        self._reader.start()

    def start(self) -> None:
        """Wait for the line that says that it is ready."""
        assert self._ready.wait(START_S), f"not ready:\n{self.said()}"
        assert self.launcher.poll() is None, f"ended with {self.launcher.returncode}:\n{self.said()}"

    def said(self, last: int = 60) -> str:
        return "\n".join(self.log[-last:])

    # --- its processes -----------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster that is alive, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self._folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def process(self, name: str) -> psutil.Process:
        """The process of a worker or of the router, by the name that `ps` shows."""
        (found,) = [p for p in self.processes() if p.cmdline()[:1] == [f"baton-{name}"]]
        return found

    def send(self, name: str, number: signal.Signals) -> psutil.Process:
        process = self.process(name)
        process.send_signal(number)
        return process

    def replaced(self, old: psutil.Process, name: str) -> bool:
        """Whether another process has the name of one that was killed, and has said that it serves."""
        if old.is_running() and old.status() != psutil.STATUS_ZOMBIE:
            return False
        return any(p.pid != old.pid and p.cmdline()[:1] == [f"baton-{name}"] for p in self.processes())

    # --- what it says of itself --------------------------------------------------------------------------------

    def is_healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        return False

    def metric(self, name: str, label: str = "engine") -> Samples:
        """Samples of this name by worker and by the value of `label`. The router's own have the engine ''."""
        found: Samples = defaultdict(lambda: defaultdict(float))
        with suppress(httpx.HTTPError):
            text = httpx.get(f"{self.url}/metrics", timeout=10).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == name:
                        found[sample.labels.get("engine", "")][sample.labels.get(label, "")] += sample.value
        return found

    def total(self, name: str, label: str = "engine", value: str | None = None) -> float:
        """The sum over all workers, of one value of a label if one is given."""
        by_worker = self.metric(name, label).values()
        return sum(number for by in by_worker for key, number in by.items() if value in (None, key))

    def wait_until(self, what: str, holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        """Look again and again; fail with the cluster's last words when the time is over."""
        ends_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < ends_s, f"{within_s:.0f} s, and not yet: {what}\n{self.said()}"
            time.sleep(0.01)

    def quiesce(self, workers: int) -> None:
        """Every worker answers, holds nothing for anybody, and its page counts add up to its pool."""

        def is_quiet() -> bool:
            pages = self.metric("baton:pages", "state")
            return len(pages) == workers and all(_is_at_rest(by_state) for by_state in pages.values())

        self.wait_until("every page is free or cached", is_quiet)
        pages = self.metric("baton:pages", "state")
        totals = {name: sum(by_state.values()) for name, by_state in pages.items()}
        assert set(totals.values()) == {PAGES - 1}, f"all but the scratch page: {totals}"
        assert self.total("baton:handoffs_in_flight") == 0
        assert self.total("baton:router_inflight_requests") == 0

    # --- its end -----------------------------------------------------------------------------------------------

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Seconds until the launcher and everything that it started has ended."""
        began_s = time.monotonic()
        self.launcher.send_signal(number)
        code = self.launcher.wait(PATIENCE_S)
        took_s = time.monotonic() - began_s
        assert code == 0, f"exit code {code}\n{self.said()}"
        return took_s

    def assert_nothing_left(self) -> None:
        """No process, no temporary file, no shared memory."""
        self.wait_until("every process has ended", lambda: not self.processes())
        self._reader.join(PATIENCE_S)
        assert os.listdir(self._folder) == [], f"temporary files are left: {os.listdir(self._folder)}"
        self.wait_until("no shared memory is left", lambda: not set(os.listdir("/dev/shm")) - self._shm_before)

    def destroy(self) -> None:
        """Whatever has happened, leave no process and no folder behind."""
        for process in [self.launcher, *self.processes()]:
            with suppress(psutil.Error):
                process.kill()
        self.launcher.wait(PATIENCE_S)
        psutil.wait_procs(self.processes(), PATIENCE_S)
        self._reader.join(PATIENCE_S)
        self.launcher.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> None:
        for line in self.launcher.stdout:
            self.log.append(line.rstrip("\n"))
            if line.startswith("ready: "):
                self._ready.set()
        self._ready.set()  # it will not come any more


def _is_at_rest(pages: dict[str, float]) -> bool:
    return pages["owned"] == pages["leased"] == pages["quarantined"] == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(*flags: str, workers: int = 2) -> Iterator[Cluster]:
    """A cluster for a `with` block. In the end it must be at rest, and stop in time without leaving anything."""
    with started(*flags) as cluster:
        yield cluster
        cluster.quiesce(workers)
        took_s = cluster.stop()
        cluster.assert_nothing_left()
        assert took_s < STOP_S


@contextmanager
def started(*flags: str) -> Iterator[Cluster]:
    """A cluster that the block itself brings to its end."""
    cluster = Cluster(*flags)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()
