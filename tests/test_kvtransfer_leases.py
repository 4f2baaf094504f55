"""Leases are renewed while a worker computes: whatever a step does to its own thread, and for a while to the others."""

import asyncio
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_kvtransfer_processes import ROOT, Sink

from core.clock import monotonic_s
from kvtransfer.messages import Renew

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).with_name("kvtransfer_busy_process.py")
WATCHED_S = 4.0
RENEW_S = 0.2  # of the program
LEASE_S = 10.0  # of a worker, which renews every 2 s: ten times slower than the program, and with the same work
SLACK_S = 1.5  # of a machine that does other things meanwhile


async def renewals(kind: str, stretch_s: float) -> list[float]:
    """When they came, while the program stepped."""
    sink, times = Sink("shm"), []
    await sink.open()
    take = sink.worker.link.receive

    def receive(peer: Any, message: Any) -> None:
        if isinstance(message, Renew):
            times.append(monotonic_s())
        take(peer, message)

    sink.worker.link.receive = receive  # type: ignore[method-assign]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), "p", "1", "d", "1", sink.endpoint, kind, str(stretch_s),
        stdin=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        async with asyncio.timeout(30.0):
            while not times:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0 + WATCHED_S)
    finally:
        process.kill()
        await process.wait()
        await sink.close()
    return times


@pytest.mark.parametrize(
    ("kind", "stretch_s"), [("thread", 3.0), ("interpreter", 0.05)], ids=["its thread", "the interpreter"]
)
async def test_steps_do_not_keep_leases_from_being_renewed(kind: str, stretch_s: float) -> None:
    """A step that keeps the interpreter's lock delays a renewal by some fifteen of its stretches: 50 ms do no harm."""
    times = await renewals(kind, stretch_s)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    longest_s = max(gaps) if gaps else WATCHED_S
    assert longest_s < RENEW_S + 15 * (stretch_s if kind == "interpreter" else 0.0) + SLACK_S < LEASE_S / 2
