"""`baton status` and `baton top` over a real cluster: they agree with its metrics, and see a worker die."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.processes.answers import Answer, ask, body, some_tokens
from tests.processes.cluster import PATIENCE_S, ROOT, Cluster, serving

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
REQUESTS = 8
TOKENS = 24


@pytest.fixture(scope="module")
def loaded() -> Iterator[Cluster]:
    """A cluster that has served a few requests, and nothing else."""
    with serving() as cluster:
        asyncio.run(_load(cluster))
        cluster.quiesce(2)
        yield cluster


async def _load(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as client:
        prompts = [body(some_tokens(50 + number, 300), TOKENS) for number in range(REQUESTS)]
        await asyncio.gather(*(ask(client, prompt, Answer()) for prompt in prompts))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "baton", *words]


def status(cluster: Cluster, *flags: str) -> tuple[int, str]:
    done = subprocess.run(
        command("status", cluster.url, *flags),
        env=ENVIRONMENT,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert not done.stderr and done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def view_of(cluster: Cluster) -> tuple[int, dict[str, Any]]:
    code, text = status(cluster, "--json")
    return code, json.loads(text)


def test_the_status_agrees_with_the_metrics(loaded: Cluster) -> None:
    loaded.wait_until("the workers have told their load", lambda: _pages(loaded) == _pages_in_metrics(loaded))
    code, view = view_of(loaded)
    assert code == 0 and view["findings"] == []
    assert view["first_token"]["observed"] == loaded.total("vllm:time_to_first_token_seconds_count") == REQUESTS
    assert view["token_gap"]["observed"] == loaded.total("vllm:inter_token_latency_seconds_count") > REQUESTS
    assert 0 < view["first_token"]["p50_s"] <= view["first_token"]["p90_s"] <= view["first_token"]["p99_s"]
    workers = loaded.metric("baton:tier_workers", "state")[""]
    assert workers == {"ready": 2, "starting": 0, "draining": 0}
    assert [(tier["tier"], tier["ready"]) for tier in view["tiers"]] == [("prefill", 1), ("decode", 1)]
    paths = loaded.metric("baton:path_bytes_per_second", "peer")
    (pair,) = [pair for pair in view["handoffs"] if pair["needed"]]
    assert (pair["source"], pair["receiver"], pair["transport"]) == ("prefill-0", "decode-0", "shm")
    assert pair["bytes_per_s"] == pytest.approx(paths["decode-0"]["prefill-0"])
    code, text = status(loaded)
    assert code == 0 and "all is well" in text and f"{REQUESTS} requests in" in text
    assert all(name in text for name in ("prefill-0", "decode-0", "router", "shm", "registry: none"))


def _pages(cluster: Cluster) -> dict[str, dict[str, float]]:
    found = httpx.get(f"{cluster.url}/cluster", timeout=PATIENCE_S).json()
    return {worker["name"]: worker["pages"] for worker in found["workers"]}


def _pages_in_metrics(cluster: Cluster) -> dict[str, dict[str, float]]:
    return {name: dict(states) for name, states in cluster.metric("baton:pages", "state").items()}


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, *words: str) -> None:
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 140, 0, 0))
        self.before = termios.tcgetattr(self._theirs)
        self.shown = b""
        end = self._theirs
        self.process = subprocess.Popen(command(*words), stdin=end, stdout=end, stderr=end, env=ENVIRONMENT, cwd="/")

    def read_until(self, what: bytes, times: int = 1) -> None:
        ends_s = time.monotonic() + PATIENCE_S
        while self.shown.count(what) < times:
            assert time.monotonic() < ends_s and self.process.poll() is None, self.shown[-2000:]
            self._read(0.1)

    def key(self, key: bytes) -> None:
        os.write(self._ours, key)

    def wait(self) -> int:
        ends_s = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < ends_s, self.shown[-2000:]
            self._read(0.1)
        while self._read(0.0):
            pass
        return int(self.process.returncode)

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._ours)
        os.close(self._theirs)

    def _read(self, for_s: float) -> bool:
        if not select.select([self._ours], [], [], for_s)[0]:
            return False
        self.shown += os.read(self._ours, 65536)
        return True


@pytest.fixture
def live(loaded: Cluster) -> Iterator[Terminal]:
    terminal = Terminal("top", loaded.url, "--interval-s", "0.3")
    yield terminal
    terminal.close()


def _q(terminal: Terminal) -> None:
    terminal.key(b"xq")


def _interrupt(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGINT)


def _terminate(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [_q, _interrupt, _terminate])
def test_top_refreshes_and_gives_the_terminal_back(live: Terminal, end: Any) -> None:
    live.read_until(b"prefill-0", times=6)  # two of each picture: its worker, its hand-offs
    assert live.settings != live.before
    end(live)
    assert live.wait() == 0 and live.settings == live.before
    on, off = b"\x1b[?1049h", b"\x1b[?1049l"  # the alternate screen
    assert live.shown.count(on) == live.shown.count(off) == 1 and live.shown.rindex(b"\x1b[?25h") > live.shown.index(on)


def test_without_a_terminal_top_prints_pages(loaded: Cluster) -> None:
    top = subprocess.Popen(
        command("top", loaded.url, "--interval-s", "0.2"),
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert top.stdout is not None
        pages = 0
        for line in top.stdout:
            assert "\x1b" not in line
            pages += "all is well" in line
            if pages == 2:
                break
        top.send_signal(signal.SIGTERM)
        top.stdout.read()
        assert top.wait(PATIENCE_S) == 0
    finally:
        top.kill()
        top.wait(PATIENCE_S)
        top.stdout.close()


def test_a_killed_worker_is_said_and_forgotten_when_it_is_back(loaded: Cluster) -> None:
    old = loaded.send("decode-0", signal.SIGKILL)
    found: dict[str, Any] = {}

    def is_said() -> bool:
        code, view = view_of(loaded)
        found.update(view)
        return code == 1

    loaded.wait_until("status says what is wrong", is_said)
    said = {where: finding["what"] for finding in found["findings"] for where in finding["where"]}
    assert said["decode-0"] in ("has gone", "has no session with this router")
    assert any("no decode worker is ready" in finding["what"] for finding in found["findings"])
    assert all(finding["advice"] for finding in found["findings"])
    tiers = {tier["tier"]: tier for tier in found["tiers"]}
    assert (tiers["decode"]["ready"], tiers["decode"]["gone"], tiers["prefill"]["ready"]) == (0, 1, 1)
    loaded.wait_until("another has its place", lambda: loaded.replaced(old, "decode-0"))
    loaded.wait_until("all is well", lambda: status(loaded)[0] == 0)


def test_an_aggregated_cluster_has_one_tier(aggregated: Cluster) -> None:
    code, view = view_of(aggregated)
    assert code == 0 and view["handoffs"] == []
    assert [(tier["tier"], tier["ready"]) for tier in view["tiers"]] == [("aggregated", 2)]
