"""A Baton whose processes are started one by one, as an operator would on several hosts: over TCP, each anywhere.

Nobody starts again what has died but the test. For everything else it is a `Cluster` like that of `baton serve`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes.cluster import MODEL, PAGES, PATIENCE_S, ROOT, START_S, Cluster

ALL_WORKERS = ("--dtype", "float32", "--pages", str(PAGES), "--max-context", "2048", "--threads", "1")


@dataclass(frozen=True)
class Part:
    """One process: `command` is worker or router. `prefix` puts it somewhere else, and must exec it."""

    name: str
    command: str
    flags: tuple[str, ...]
    prefix: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "baton", self.command, "--name", self.name, *self.flags]


def worker(name: str, role: str, listen: str, *flags: str, prefix: Sequence[str] = ()) -> Part:
    """Small steps: a long prompt is prefilled for as long as the test needs to find it at that."""
    own = ("--role", role, "--model", str(MODEL), "--listen", listen, "--step-tokens", "32", "--insecure")
    return Part(name, "worker", (*own, *ALL_WORKERS, *flags), tuple(prefix))


def router(workers: dict[str, str], host: str, port: int, *flags: str, prefix: Sequence[str] = ()) -> Part:
    """`workers`: the address of each by name, as the router is to dial it."""
    addresses = ",".join(f"{name}={address}" for name, address in workers.items())
    own = ("--model", str(MODEL), "--workers", addresses, "--host", host, "--port", str(port), "--insecure")
    return Part("router", "router", (*own, "--max-context", "2048", *flags), tuple(prefix))


class Parts(Cluster):
    """`url` answers once `start` has returned."""

    def __init__(self, url: str, parts: Sequence[Part], environment: dict[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
        self._shm_before = set(os.listdir("/dev/shm"))
        self.url = url
        self.log = []
        self._environment = environment or {}
        self._parts = {part.name: part for part in parts}
        self._running: dict[str, psutil.Popen] = {}
        self._readers: list[threading.Thread] = []
        for name in self._parts:
            self.launch(name)

    def launch(self, name: str) -> None:
        """Start a part, for the first time or again."""
        process = psutil.Popen(
            self._parts[name].argv(),
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._folder), **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._running[name] = process
        reader = threading.Thread(target=self._read_from, args=(name, process), name=f"log of {name}", daemon=True)
        reader.start()
        self._readers.append(reader)

    def start(self) -> None:
        self.wait_until("it is healthy", lambda: self._has_ended() or self.is_healthy(), START_S)
        assert not self._has_ended(), self.said()

    def _has_ended(self) -> bool:
        return any(process.poll() is not None for process in self._running.values())

    def kill(self, name: str) -> None:
        """By SIGKILL, and see it gone."""
        self._running[name].kill()
        self._running[name].wait(PATIENCE_S)

    def process(self, name: str) -> psutil.Process:
        return self._running[name]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """All at once. Each must end by itself, and well."""
        for process in self._running.values():
            process.send_signal(number)
        codes = {name: process.wait(PATIENCE_S) for name, process in self._running.items()}
        assert set(codes.values()) == {0}, f"{codes}\n{self.said()}"
        return 0.0

    def assert_nothing_left(self) -> None:
        for reader in self._readers:
            reader.join(PATIENCE_S)
        self._reader = self._readers[-1]
        super().assert_nothing_left()

    def destroy(self) -> None:
        for process in [*self._running.values(), *self.processes()]:
            with suppress(psutil.Error):
                process.kill()
        for process in self._running.values():
            process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for process in self._running.values():
            process.stdout.close()
        for left in self._folder.iterdir():
            left.unlink()
        self._folder.rmdir()

    def _read_from(self, name: str, process: psutil.Popen) -> None:
        for line in process.stdout:
            self.log.append(f"[{name}] {line.rstrip()}")


@contextmanager
def running(parts: Parts, workers: int) -> Iterator[Parts]:
    """For a `with` block. In the end it must be at rest, and stop without leaving anything."""
    try:
        parts.start()
        yield parts
        parts.quiesce(workers)
        parts.stop()
        parts.assert_nothing_left()
    finally:
        parts.destroy()
