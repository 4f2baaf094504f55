"""Workers, routers and a Redis on two hosts, which find each other in the registry and by nothing else.

    host P: prefill-p, decode-p, router-p                    host D: Redis, prefill-d, decode-d, router-d
            pages, hand-offs and requests go over `data`, what concerns Redis over `control`
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chaos.netns import D_END, LINKS, P_END, ROUTER_ADDRESS, ROUTER_ADDRESS_P, Hosts
from tests.processes.cluster import MODEL, ROOT
from tests.processes.fleet import SMALL, Fleet
from tests.redis_server import RedisServer
from tests.servers import need

REDIS_PORT, ROUTER_PORT = 6390, 8000
WORKER_PORTS = {"prefill": 7001, "decode": 7002}
REGISTRY = f"redis://{LINKS['control']}{D_END}:{REDIS_PORT}/0"
UCX = ("--ucx-tls", "tcp", "--ucx-net-devices", "data")
WORKERS = frozenset({"prefill-p", "decode-p", "prefill-d", "decode-d"})


class FarRedis(RedisServer):
    """On host D; the test reaches it over a link of its own."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder, port=REDIS_PORT)
        self._prefix = ("ip", "netns", "exec", hosts.d)

    @property
    def url(self) -> str:
        return f"redis://{ROUTER_ADDRESS}:{self.port}/0"

    def start(self) -> None:
        plain = ("--bind", "0.0.0.0", "--protected-mode", "no", "--port", str(self.port), "--save", "")
        self._process = subprocess.Popen(
            [*self._prefix, "redis-server", *plain, "--dir", str(self.folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + 10.0
        while not self._hears():
            assert time.monotonic() < until_s and self._process.poll() is None, "redis-server does not start"
            time.sleep(0.02)

    def ask(self, *words: str) -> None:
        """One command, which must be answered well."""
        with socket.create_connection((ROUTER_ADDRESS, self.port), timeout=5) as connection:
            connection.sendall(" ".join(words).encode() + b"\r\n")
            answer = connection.recv(256)
            assert answer[:1] == b"+", answer

    def _hears(self) -> bool:
        try:
            self.ask("PING")
        except OSError:
            return False
        return True


class FarFleet(Fleet):
    """Four workers and two routers, two and one on each host."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder, REGISTRY, drain_s=5.0)
        self._at = {"p": (hosts.p, P_END), "d": (hosts.d, D_END)}
        self.urls = [f"http://{address}:{ROUTER_PORT}" for address in (ROUTER_ADDRESS_P, ROUTER_ADDRESS)]
        for host in self._at:
            for role, port in WORKER_PORTS.items():
                reached = f"{LINKS['data']}{self._at[host][1]}:{port}"
                listen = ("--listen", f"0.0.0.0:{port}", "--advertise", reached)
                mine = ("--role", role, "--drain-s", "5", *listen, *UCX)
                self._start(f"{role}-{host}", "worker", (*mine, *SMALL))
            front = ("--host", "0.0.0.0", "--port", str(ROUTER_PORT), "--max-context", "2048")
            self._start(f"router-{host}", "router", front)

    def _start(self, name: str, command: str, flags: tuple[str, ...]) -> None:
        prefix = ("ip", "netns", "exec", self._at[name[-1]][0], sys.executable, "-m", "baton", command)
        shared = ("--name", name, "--model", str(MODEL), "--insecure", "--registry", self._registry)
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*prefix, *shared, *flags],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def far_fleet(hosts: Hosts) -> Iterator[tuple[FarFleet, FarRedis]]:
    """Every router sees every worker; in the end all processes end by themselves, and well."""
    need("redis-server")
    need("redis")
    with TemporaryDirectory(prefix="bt-", dir="/tmp") as folder:
        redis = FarRedis(Path(folder), hosts)
        redis.start()
        made = None
        try:
            made = FarFleet(Path(folder), hosts)
            made.until_ready(*WORKERS)
            yield made, redis
            made.stop()
        finally:
            if made is not None:
                made.destroy()
            redis.stop()
