"""Real workers and routers that are told to stop under load: every client gets every token, and nothing is left.

Started by hand, one process each, as a cluster would: two prefill and two decode workers, and a router.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes.answers import Answer, ask, assert_right, body, some_tokens
from tests.processes.cluster import MODEL, PATIENCE_S, ROOT, START_S, free_port

POOL = ("--dtype=float32", "--pages=1024", "--max-context=2048", "--threads=1", "--step-tokens=64", "--insecure")
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
LONG = [body(some_tokens(20 + n, 60 + 40 * n), 900, temperature=float(n % 2), seed=n) for n in range(6)]
SHORT_S, AMPLE_S = 1.5, 60.0  # less and more than the long ones take


class ByHand:
    """Its processes by name; `drain_s` of those that are started from now on can be changed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start_worker(self, name: str, drain_s: float) -> None:
        where = f"--listen=unix:{self.folder / name}"
        self._start("worker", name, f"--role={name.split('-')[0]}", where, f"--drain-s={drain_s}", *POOL)

    def start_router(self, drain_s: float) -> None:
        workers = ",".join(f"{name}=unix:{self.folder / name}" for name in NAMES)
        flags = (f"--workers={workers}", f"--port={self.port}", f"--drain-s={drain_s}", "--max-context=2048")
        self._start("router", "router", "--insecure", *flags)

    def _start(self, command: str, name: str, *flags: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "baton", command, f"--name={name}", f"--model={MODEL}", *flags],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_serving(self) -> None:
        """Every worker has a session with the router."""
        ends_s = time.monotonic() + START_S
        while True:
            with suppress(httpx.HTTPError):
                text = httpx.get(f"{self.url}/metrics", timeout=10).text
                if all(f'baton:drain_seconds{{engine="{name}"' in text for name in NAMES):
                    return
            assert time.monotonic() < ends_s, self.said()
            time.sleep(0.1)

    def total(self, metric: str) -> float:
        """Of the router's own counters."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        found = [line for line in text.splitlines() if line.startswith(metric)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def ended(self, name: str, within_s: float) -> float:
        """Seconds until it has ended, with exit code 0."""
        began_s = time.monotonic()
        code = self.processes.pop(name).wait(within_s)
        assert code == 0, self.said(name)
        return time.monotonic() - began_s

    def said(self, *names: str) -> str:
        chosen = names or tuple(self.processes)
        return "\n".join(f"{name}: {(self.folder / f'{name}.log').read_text()[-3000:]}" for name in chosen)

    def outcome(self, name: str) -> str:
        lines = [line for line in self.said(name).splitlines() if "drained for" in line]
        return lines[-1].rsplit(": ", 1)[1]

    def destroy(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(PATIENCE_S)
        left = {path.name for path in self.folder.iterdir() if not path.name.endswith(".log")}
        shutil.rmtree(self.folder)
        assert not left - set(self.processes), "a worker that ended left its socket"


@pytest.fixture(scope="module")
def shared() -> Iterator[ByHand]:
    cluster = ByHand()
    try:
        for name in NAMES:
            cluster.start_worker(name, AMPLE_S)
        cluster.start_router(AMPLE_S)
        cluster.wait_until_serving()
        yield cluster
    finally:
        cluster.destroy()


@pytest.fixture
def cluster(shared: ByHand) -> Iterator[ByHand]:
    """Whole at the beginning of each test."""
    for name in NAMES:
        if name not in shared.processes:
            shared.start_worker(name, AMPLE_S)
    if "router" not in shared.processes:
        shared.start_router(AMPLE_S)
    shared.wait_until_serving()
    yield shared


@pytest.fixture(scope="module")
def right(shared: ByHand) -> dict[str, Answer]:
    async def undisturbed() -> list[Answer]:
        async with httpx.AsyncClient(base_url=shared.url) as client:
            return await asyncio.gather(*(ask(client, request, Answer()) for request in LONG))

    answers = asyncio.run(undisturbed())
    return {str(request): answer for request, answer in zip(LONG, answers, strict=True)}


async def under_load(cluster: ByHand, salt: str, tell: Any) -> list[Answer]:
    """All long ones, streamed; `tell` is called when some of them run and others begin."""
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        answers = [Answer() for _ in LONG]
        first, last = LONG[:4], LONG[4:]
        tasks = [
            asyncio.create_task(ask(client, {**request, "cache_salt": salt}, answer))
            for request, answer in zip(first, answers, strict=False)
        ]
        ends_s = time.monotonic() + PATIENCE_S
        while any(answer.count < 20 for answer in answers[: len(first)]):
            assert time.monotonic() < ends_s, cluster.said()
            await asyncio.sleep(0.005)
        for request, answer in zip(last, answers[len(first) :], strict=True):
            tasks.append(asyncio.create_task(ask(client, {**request, "cache_salt": salt}, answer)))
        await asyncio.sleep(0.05)
        await tell()
        return list(await asyncio.gather(*tasks))


@pytest.mark.parametrize("drain_s", [SHORT_S, AMPLE_S])
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_a_worker_drains_and_no_client_sees_it(
    cluster: ByHand, right: dict[str, Answer], name: str, drain_s: float
) -> None:
    if drain_s != AMPLE_S:
        cluster.processes[name].terminate()
        cluster.ended(name, PATIENCE_S)
        cluster.start_worker(name, drain_s)
        await asyncio.to_thread(cluster.wait_until_serving)
    retries, took_s = cluster.total("baton:retries_total"), 0.0

    async def tell() -> None:
        cluster.processes[name].send_signal(signal.SIGTERM)

    answers = await under_load(cluster, f"{name} {drain_s}", tell)
    for answer, request in zip(answers, LONG, strict=True):
        assert_right(answer, right[str(request)])
    took_s = await asyncio.to_thread(cluster.ended, name, drain_s + 5.0)
    assert took_s < drain_s
    if name.startswith("decode"):
        assert cluster.outcome(name) == ("handed_back" if drain_s == SHORT_S else "finished")
    assert cluster.total("baton:retries_total") == retries, "a drain is no failure"


async def test_a_second_signal_ends_it_at_once(cluster: ByHand, right: dict[str, Answer]) -> None:
    async def tell() -> None:
        process = cluster.processes["decode-0"]
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert process.poll() is None, "it drains"
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(cluster.ended, "decode-0", 10.0) < 5.0

    for answer, request in zip(await under_load(cluster, "second", tell), LONG, strict=True):
        assert_right(answer, right[str(request)])


async def test_a_router_finishes_its_streams_and_takes_nothing_new(cluster: ByHand, right: dict[str, Answer]) -> None:
    async def tell() -> None:
        async with httpx.AsyncClient(base_url=cluster.url) as kept:
            assert (await kept.get("/health", timeout=10)).status_code == 200
            cluster.processes["router"].send_signal(signal.SIGTERM)
            ends_s = time.monotonic() + PATIENCE_S
            while (reply := await kept.get("/health", timeout=10)).status_code == 200:
                assert time.monotonic() < ends_s
            assert reply.status_code == 503 and "draining" in reply.json()["error"]["message"]
            assert reply.headers["connection"] == "close"

    answers = await under_load(cluster, "router", tell)
    for answer, request in zip(answers, LONG, strict=True):
        assert_right(answer, right[str(request)])
    assert await asyncio.to_thread(cluster.ended, "router", PATIENCE_S) < 10.0
