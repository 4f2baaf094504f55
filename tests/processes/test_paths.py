"""Paths between real workers: proved by the doctor in `baton serve`, and between workers started by hand over TCP."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.certificates import Authority
from tests.processes.cluster import MODEL, PATIENCE_S, ROOT, SMALL, START_S, Cluster, free_port, serving

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def doctor(*flags: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was found."""
    command = [sys.executable, "-m", "baton", "doctor", "transport", "--json", *flags]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd="/"
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def said(url: str) -> str:
    body = {"model": "baton-tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


class TestServed:
    def test_the_doctor_finds_shared_memory_between_all_workers(self, disaggregated: Cluster) -> None:
        code, found = doctor("--url", disaggregated.url)
        assert code == 0 and found["findings"] == [] and found["missing"] == []
        assert [(p["source"], p["receiver"], p["transport"]) for p in found["pairs"]] == [
            ("prefill-0", "decode-0", "shm"),
            ("decode-0", "prefill-0", "shm"),
        ]
        assert all(pair["bytes_per_s"] > 1e7 and 0 < pair["latency_s"] < 1 for pair in found["pairs"])
        shown = disaggregated.metric("baton:path_bytes_per_second", "peer")
        assert shown["decode-0"]["prefill-0"] > 1e7
        known = httpx.get(f"{disaggregated.url}/paths").json()["pairs"]
        assert [pair["transport"] for pair in known] == ["shm", "shm"]

    def test_a_worker_that_has_stopped_is_named(self, disaggregated: Cluster) -> None:
        said(disaggregated.url)
        disaggregated.send("prefill-0", signal.SIGSTOP)
        try:
            disaggregated.wait_until("the router has lost it", lambda: not disaggregated.is_healthy())
            code, found = doctor("--url", disaggregated.url)
        finally:
            disaggregated.send("prefill-0", signal.SIGCONT)
        assert code == 1 and found["missing"] == ["prefill-0"]
        disaggregated.wait_until("it is back", disaggregated.is_healthy)

    def test_ucx_gives_the_same_answer(self, disaggregated: Cluster) -> None:
        with serving("--transport", "ucx") as cluster:
            assert said(cluster.url) == said(disaggregated.url)
            code, found = doctor("--url", cluster.url)
            assert code == 0 and [pair["transport"] for pair in found["pairs"]] == ["ucx", "ucx"]
            assert all("tcp" in pair["lanes"] for pair in found["pairs"])
            assert [finding["what"] for finding in found["findings"]] == ["runs over TCP alone"]
            assert cluster.total("baton:handoffs_total", "outcome", "committed") >= 1


class ByHand:
    """Workers and a router that were started one by one, with tickets and mutual TLS."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.key_file = folder / "key"
        self.key_file.write_text(secrets.token_hex(32))
        self.key_file.chmod(0o600)
        self._key = ("--ticket-key-file", str(self.key_file))
        self._authority = Authority(folder / "authority")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.addresses: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{free_port()}"

    def worker(self, name: str, role: str, *flags: str) -> None:
        self.addresses[name] = address = f"127.0.0.1:{free_port()}"
        where = ("--name", name, "--role", role, "--model", str(MODEL), "--listen", address)
        self._start(name, "worker", *where, *SMALL, *self._key, *self.tls(role), *flags)

    def router(self) -> None:
        port = self.url.rpartition(":")[2]
        flags = ("--model", str(MODEL), "--workers", self.workers, "--port", port, *self._key, *self.tls("router"))
        self._start("router", "router", *flags)

    def tls(self, role: str) -> tuple[str, ...]:
        """The flags of a service."""
        certificate, key = self._authority.issue(role)
        files = {"cert": certificate, "key": key, "ca": self._authority.certificate}
        return tuple(f"--tls-{name}={path}" for name, path in files.items())

    @property
    def workers(self) -> str:
        return ",".join(f"{name}={address}" for name, address in self.addresses.items())

    def _start(self, name: str, command: str, *flags: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "baton", command, *flags],
                env=ENVIRONMENT,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def wait(self) -> None:
        """Until the router answers for all of them."""
        ends_s = time.monotonic() + START_S
        while True:
            ended = {name: p.poll() for name, p in self._processes.items() if p.poll() is not None}
            assert not ended, [self.log(name) for name in ended]
            assert time.monotonic() < ends_s, [self.log(name) for name in self._processes]
            try:
                if not httpx.get(f"{self.url}/paths", timeout=5).json()["missing"]:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)

    def stop(self) -> None:
        """All of them end by themselves, soon."""
        for process in self._processes.values():
            process.terminate()
        for name, process in self._processes.items():
            assert process.wait(PATIENCE_S) == 0, self.log(name)

    def destroy(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_S)


@contextmanager
def by_hand() -> Iterator[ByHand]:
    with tempfile.TemporaryDirectory(prefix="bt-") as folder:
        hand = ByHand(Path(folder))
        try:
            yield hand
        finally:
            hand.destroy()


class TestByHand:
    def test_two_workers_over_tcp_hand_pages_over_by_ucx(self, disaggregated: Cluster) -> None:
        with by_hand() as hand:
            expected = ("--expect-transport", "ucx:tcp", "--on-fallback", "error")
            flags = ("--transport", "ucx", "--ucx-tls", "tcp", *expected)
            hand.worker("p", "prefill", *flags)
            hand.worker("d", "decode", *flags)
            hand.router()
            hand.wait()
            tls = hand.tls("doctor")
            code, found = doctor("--workers", hand.workers, *hand.tls("prefill"))
            assert code == 1 and found["missing"] == ["p", "d"], "a prefill worker is no doctor"
            code, found = doctor("--workers", hand.workers, *tls)
            assert code == 1 and "--ticket-key-file" in found["findings"][0]["advice"], "nobody dials for a stranger"
            code, found = doctor("--workers", hand.workers, "--ticket-key-file", str(hand.key_file), *tls)
            assert code == 0 and [pair["transport"] for pair in found["pairs"]] == ["ucx", "ucx"]
            assert said(hand.url) == said(disaggregated.url)
            assert "serves on " + hand.addresses["d"] in hand.log("d")
            hand.stop()

    def test_lanes_that_were_expected_and_are_not_there_leave_no_path_and_the_doctor_says_so(self) -> None:
        with by_hand() as hand:
            flags = ("--transport", "ucx", "--expect-transport", "ucx:rc_mlx5", "--on-fallback", "error")
            hand.worker("p", "prefill", "--transport", "ucx")
            hand.worker("d", "decode", *flags)
            hand.router()
            hand.wait()
            code, found = doctor("--url", hand.url)
            assert code == 1 and found["pairs"][0]["transport"] == ""
            (wrong,) = [finding for finding in found["findings"] if finding["wrong"]]
            assert wrong["where"] == ["p -> d"] and "expected ucx over rc_mlx5, got tcp" in wrong["what"]
            assert "--ucx-net-devices" in wrong["advice"]
            hand.stop()

    @pytest.mark.parametrize(
        "flags,code,words",
        [
            (("--listen", "0.0.0.0:0"), 2, "--advertise"),
            (("--listen", "somewhere"), 2, "host:port is needed"),
            (("--listen", "127.0.0.1:1x"), 2, "host:port is needed"),
            (("--listen", "unix:/tmp/x", "--transport", "shm", "--expect-transport", "ucx"), 2, "--expect-transport"),
        ],
    )
    def test_a_worker_that_cannot_be_reached_as_asked_says_so_before_it_loads(
        self, flags: tuple[str, ...], code: int, words: str
    ) -> None:
        base = ("worker", "--name", "p", "--role", "prefill", "--model", "/nowhere", "--insecure")
        command = [sys.executable, "-m", "baton", *base, *flags]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == code and words in done.stderr and done.stderr.count("\n") == 1, done.stderr

    def test_a_port_in_use_is_said_before_anything_is_loaded(self, disaggregated: Cluster) -> None:
        base = ("worker", "--name", "p", "--role", "prefill", "--model", "/nowhere", "--insecure")
        command = [sys.executable, "-m", "baton", *base, "--listen", f"127.0.0.1:{disaggregated.port}"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 5 and "in use" in done.stderr
