"""Workers and routers that were started one by one, as on many machines, and find each other in a registry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.processes.cluster import MODEL, PATIENCE_S, ROOT, START_S, free_port

SMALL = ("--dtype", "float32", "--pages", "1024", "--max-context", "2048", "--threads", "1")


class Fleet:
    """Processes by name. `drain_s` is that of the workers."""

    def __init__(self, folder: Path, registry: str, drain_s: float = 30.0) -> None:
        self._folder = folder
        self._registry = registry
        self._drain_s = drain_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.urls: list[str] = []  # of the routers

    def worker(self, name: str, role: str, *more: str) -> None:
        mine = ("--name", name, "--role", role, "--listen", "127.0.0.1:0", "--drain-s", str(self._drain_s))
        self._start(name, "worker", (*mine, *SMALL, *more))

    def router(self, name: str) -> str:
        port = free_port()
        self._start(name, "router", ("--name", name, "--port", str(port), "--max-context", "2048"))
        self.urls.append(f"http://127.0.0.1:{port}")
        return self.urls[-1]

    def _start(self, name: str, command: str, flags: tuple[str, ...]) -> None:
        shared = ("--model", str(MODEL), "--insecure", "--registry", self._registry)
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "baton", command, *shared, *flags],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def send(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def ended(self, name: str) -> int:
        """Its exit code, once it has one."""
        return self._processes[name].wait(PATIENCE_S)

    def view(self, url: str) -> dict[str, Any]:
        """What a router says of its cluster; nothing while it does not answer."""
        with suppress(httpx.HTTPError):
            found: dict[str, Any] = httpx.get(f"{url}/cluster", timeout=10).json()
            return found
        return {}

    def ready(self, url: str) -> set[str]:
        """Names of the workers that a router sees ready."""
        return {worker["name"] for worker in self.view(url).get("workers", ()) if worker["state"] == "ready"}

    def until_ready(self, *names: str) -> None:
        """Every router sees these workers, and no others."""
        for url in self.urls:
            self.until(f"{url} sees {names}", lambda url=url: self.ready(url) == set(names), START_S)  # type: ignore[misc]

    def until(self, what: str, holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        ends_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < ends_s, f"{within_s:.0f} s, and not yet: {what}\n{self.said()}"
            time.sleep(0.05)

    def said(self) -> str:
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]) for log in logs)

    def stop(self) -> None:
        """SIGTERM to everything, routers first: all that is left ends in order."""
        running = [process for process in reversed(self._processes.values()) if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        for process in running:
            assert process.wait(PATIENCE_S) == 0, self.said()

    def destroy(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_S)


@contextmanager
def fleet(registry: str, drain_s: float = 30.0) -> Iterator[Fleet]:
    """Empty at first."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as folder:
        made = Fleet(Path(folder), registry, drain_s)
        try:
            yield made
            made.stop()
        finally:
            made.destroy()
