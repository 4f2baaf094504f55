"""One end of a hand-off in this process and the other as a process of its own, which can be killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import grpc.aio
from kvtransfer_pair import LAYOUT, PRINT, XXH3, Receiving, Sending

from core.clock import monotonic_s
from core.messages import WorkerId
from engine.pool import PagePool
from kvtransfer import server
from kvtransfer.client import HandoffDialer
from kvtransfer.frames import Frames
from kvtransfer.liveness import LeaseTerms, Timing
from tests.chaos.transports import make_transport

TESTS = Path(__file__).resolve().parents[1]
SOURCE, RECEIVER = TESTS / "kvtransfer_source_process.py", TESTS / "chaos" / "receiver_process.py"
HEAD_DIM = 2048
WIDE = replace(LAYOUT, head_dim=HEAD_DIM)  # 128 KiB a page: it takes its time, and is no small message
WIDE_PRINT = replace(PRINT, layout=WIDE)
PAGES = 257
QUICK = Timing(lease=LeaseTerms(life_s=2.0, renew_s=0.4, lost_s=0.5, tick_s=0.05))


@contextlib.asynccontextmanager
async def process_of(program: Path, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Killed at the end of the block, if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        *map(str, arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def endpoint_of(receiver: asyncio.subprocess.Process) -> str:
    """Where the receiver's process listens: its first line."""
    assert receiver.stdout is not None
    endpoint = (await receiver.stdout.readline()).decode().strip()
    assert endpoint, "the receiver has ended"
    return endpoint


def tell(process: asyncio.subprocess.Process, *words: object) -> None:
    assert process.stdin is not None
    process.stdin.write((" ".join(map(str, words)) + "\n").encode())


@contextlib.asynccontextmanager
async def receiver_here(transport_name: str) -> AsyncIterator[tuple[Receiving, str]]:
    """The decode worker, and its endpoint."""
    frames, transport = Frames.shared(WIDE, PAGES), make_transport(transport_name)
    await transport.serve(frames, XXH3)
    d = Receiving(WorkerId("d", 1), frames, transport, monotonic_s, timing=QUICK, fingerprint=WIDE_PRINT)
    service = grpc.aio.server(options=server.KEEPALIVE)
    d.link.start(server.add_handoff_service(service, d.link))
    port = service.add_insecure_port("127.0.0.1:0")
    await service.start()
    try:
        yield d, f"127.0.0.1:{port}"
    finally:
        await service.stop(0.0)
        await d.link.stop()
        await transport.close()
        frames.close()


@contextlib.asynccontextmanager
async def source_here(transport_name: str) -> AsyncIterator[Sending]:
    """The prefill worker."""
    frames, transport = Frames.shared(WIDE, PAGES), make_transport(transport_name)
    await transport.serve(frames, XXH3)
    p = Sending(
        WorkerId("p", 1), frames, transport, monotonic_s, Random(1),
        timing=QUICK, fingerprint=WIDE_PRINT, offload=asyncio.to_thread,
    )  # fmt: skip
    dialer = HandoffDialer(p.link, Random(2))
    p.link.start(dialer)
    try:
        yield p
    finally:
        await dialer.close()
        await p.link.stop()
        await transport.close()
        frames.close()


async def quiet(end: Sending | Receiving, within_s: float = 15.0) -> None:
    """It holds nothing for anybody, and its pages add up."""
    async with asyncio.timeout(within_s):
        while not end.link.idle:
            await asyncio.sleep(0.02)
    check_books(end.pool)


def check_books(pool: PagePool) -> None:
    pool.check()
    counts = pool.counts()
    assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts
