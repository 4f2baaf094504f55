"""Backend `triton` in two tiers: pages that are computed, moved and read where they lie, and the reference's tokens.

The device is a stand-in in the host's memory, and the kernels run in Triton's interpreter: no GPU has seen any of it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes.answers import Answer, ask, assert_right, body, some_tokens
from tests.processes.cluster import MODEL, PATIENCE_S, ROOT, START_S, Cluster, free_port

SMALL = ("--dtype", "float32", "--pages", "64", "--max-context", "256", "--threads", "1")
SCRIPT = Path(__file__).with_name("device_worker.py")
pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


class OnDevices:
    """A prefill and a decode worker, and their router."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        where = {name: f"unix:{folder / name}" for name in ("prefill", "decode")}
        for role, address in where.items():
            mine = ("--name", role, "--role", role, "--listen", address, "--local-prefill", "0", "--drain-s", "0")
            on_device = ("--backend", "triton", "--transport", "local", "--expect-transport", "cuda")
            strict = ("--on-fallback", "error")
            self._start(role, str(SCRIPT), "--model", str(MODEL), *mine, *on_device, *strict, *SMALL)
        workers = ",".join(f"{name}={address}" for name, address in where.items())
        shown = ("--port", self.url.rpartition(":")[2], "--workers", workers, "--local-prefill", "0")
        self._start("router", "-m", "baton", "router", "--model", str(MODEL), *shown, "--max-context", "256")

    def _start(self, name: str, *command: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *command, "--insecure"],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def logs(self) -> str:
        return "\n".join((self._folder / f"{name}.log").read_text() for name in self._processes)

    def wait(self) -> None:
        """Until the router sees both workers, and the path from one to the other has been proved or tried."""
        ends_s = time.monotonic() + START_S
        while time.monotonic() < ends_s:
            assert all(process.poll() is None for process in self._processes.values()), self.logs()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(self.logs())

    def paths(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/paths", timeout=30).json()["pairs"]
        return found

    def handed_over(self) -> list[str]:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return [line for line in text.splitlines() if line.startswith("baton:handoffs_total") and "committed" in line]

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            assert process.wait(PATIENCE_S) == 0, self.logs()

    def destroy(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_S)


@pytest.fixture
def on_devices() -> Iterator[OnDevices]:
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as folder:
        made = OnDevices(Path(folder))
        try:
            yield made
        finally:
            made.destroy()


@pytest.mark.timeout(400)  # the interpreter takes a third of a second for a token
async def test_pages_that_lie_on_a_device_are_handed_over_and_give_the_reference_tokens(
    on_devices: OnDevices, disaggregated: Cluster
) -> None:
    """A prompt of two full pages, and one with a tail that is zeroed on the device; greedy and drawn."""
    asked = [body(some_tokens(7, 32), 2), body(some_tokens(8, 18), 3, temperature=0.9, seed=5)]
    on_devices.wait()

    async def answers(url: str) -> list[Answer]:
        async with httpx.AsyncClient(base_url=url) as client:
            return list(await asyncio.gather(*(ask(client, request, Answer()) for request in asked)))

    found, reference = await answers(on_devices.url), await answers(disaggregated.url)
    for one, other in zip(found, reference, strict=True):
        assert_right(one, other)
    (path,) = [path for path in on_devices.paths() if path["receiver"] == "decode"]
    assert (path["transport"], path["trouble"]) == ("cuda", ""), path
    assert sorted(line.rpartition(" ")[2] for line in on_devices.handed_over()) == ["0.0", "0.0", "2.0", "2.0"]
    on_devices.stop()
