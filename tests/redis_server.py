"""A real redis-server for tests: on a port of its own, nothing on disk unless asked, gone at the end."""

from __future__ import annotations

import signal as signals
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import need

START_S = 10.0


class RedisServer:
    """With a `config`, which has to name the port, it is started from that file alone: Sentinel rewrites its own."""

    def __init__(self, folder: Path, *flags: str, config: Path | None = None, port: int = 0) -> None:
        self.folder = folder
        self.port = port or free_port()
        self._flags = flags
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        plain = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        arguments = [*plain, *self._flags] if self._config is None else [str(self._config), *self._flags]
        self._process = subprocess.Popen(
            ["redis-server", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until_s = time.monotonic() + START_S
        while not self._answers():
            assert time.monotonic() < until_s and self._process.poll() is None, "redis-server does not start"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16)[:1] in (b"+", b"-")
        except OSError:
            return False

    def signal(self, number: signals.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signals.Signals = signals.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(signals.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def redis_server(folder: Path, *flags: str) -> Iterator[RedisServer]:
    """Skips or fails the test where there is none: see tests.servers."""
    need("redis-server")
    need("redis")
    server = RedisServer(folder, *flags)
    server.start()
    try:
        yield server
    finally:
        server.stop()
