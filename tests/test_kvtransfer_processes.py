"""Two processes, gRPC between them and shared memory under them: hand-offs, and sources that are killed and stopped.

The memory is the host's, or that of a stand-in device, which the receiver opens as it opens a GPU's.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import grpc.aio
import pytest
from kvtransfer_pair import LAYOUT, XXH3, Prompt, Receiving, prompt_of

from core.clock import monotonic_s
from core.errors import PeerLost
from core.messages import Peer, WorkerId
from kvtransfer import server
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.frames import Frames
from kvtransfer.liveness import LeaseTerms, Timing
from kvtransfer.messages import HandoffKey
from kvtransfer.shm import ShmTransport
from tests.kvtransfer_seen import Seen, served

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "kvtransfer_source_process.py"
QUICK = Timing(lease=LeaseTerms(life_s=2.0, renew_s=0.4, lost_s=0.5, connect_s=20.0, tick_s=0.05))


class Sink:
    """The decode worker: this process."""

    def __init__(self, kind: str) -> None:
        on_device = kind == "cuda"
        self.frames: Any = (
            Seen(Frames.on_device(LAYOUT, 257, InMemoryDevice())) if on_device else Frames.shared(LAYOUT, 257)
        )
        self.transport = CudaIpcTransport() if on_device else ShmTransport()
        self.worker = Receiving(WorkerId("d", 1), self.frames, self.transport, monotonic_s, timing=QUICK)
        self.server = grpc.aio.server(options=server.KEEPALIVE)
        self.endpoint = ""

    async def open(self) -> None:
        await self.transport.serve(served(self.frames), XXH3)
        self.worker.link.start(server.add_handoff_service(self.server, self.worker.link))
        self.endpoint = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def close(self) -> None:
        await self.server.stop(0.0)
        await self.worker.link.stop()
        await self.transport.close()
        self.frames.close()

    def expect(self, key: HandoffKey, tokens: int, seed: int, source: WorkerId) -> Prompt:
        prompt = prompt_of(Random(seed), tokens)
        self.worker.expect(key, prompt, Peer(source, ""))
        return prompt

    async def quiet(self) -> None:
        """Nothing is held any more."""
        async with asyncio.timeout(10.0):
            while not self.worker.link.idle:
                await asyncio.sleep(0.02)
        self.worker.pool.check()
        counts = self.worker.pool.counts()
        assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts


class Child:
    """The prefill worker: a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, me: WorkerId) -> None:
        self.process = process
        self.me = me

    def ask(self, key: HandoffKey, tokens: int, seed: int, *, pages: int = 2, pause_s: float = 0.001) -> None:
        assert self.process.stdin is not None
        line = f"{key.request_id} {key.attempt} {tokens} {seed} {pages} {pause_s}\n"
        self.process.stdin.write(line.encode())


@contextlib.asynccontextmanager
async def child_of(sink: Sink, incarnation: int) -> AsyncIterator[Child]:
    arguments = ["p", str(incarnation), "d", "1", sink.endpoint, sink.transport.name]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAM),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield Child(process, WorkerId("p", incarnation))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(params=["shm", "cuda"])
async def sink(request: pytest.FixtureRequest) -> AsyncIterator[Sink]:
    sink = Sink(request.param)
    await sink.open()
    yield sink
    await sink.close()


async def test_pages_cross_and_both_processes_hold_nothing_afterwards(sink: Sink) -> None:
    async with child_of(sink, 1) as child:
        keys = [HandoffKey(f"r{number}", 1) for number in range(30)]
        for number, key in enumerate(keys):
            sink.expect(key, 20 + 5 * number, number, child.me)
            child.ask(key, 20 + 5 * number, number)
        for key in keys:
            await sink.worker.until_ended(key, 20.0)
            sink.worker.drop(key)
        assert len(sink.worker.commits) == 30 and not sink.worker.wrong
        await sink.quiet()
        assert child.process.stdin is not None and child.process.stdout is not None
        child.process.stdin.close()
        assert b"'owned': 0, 'leased': 0" in await asyncio.wait_for(child.process.stdout.readline(), 10.0)


def pools_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:baton-pool")


@pytest.mark.parametrize("chunks", [0, 1, 3, 6])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_source_that_is_lost_in_any_state_gives_everything_back(
    sink: Sink, what: signal.Signals, chunks: int
) -> None:
    """And the next one, of the same name, serves the request: what was verified is a prefix hit."""
    maps = pools_mapped()
    key = HandoffKey("r", 1)
    async with child_of(sink, 1) as child:
        sink.expect(key, 6 * 16 + 5, 1, child.me)
        child.ask(key, 6 * 16 + 5, 1, pages=1, pause_s=0.05)
        async with asyncio.timeout(10.0):
            while sink.worker.link.counts()["granted"] + sink.worker.link.counts()["streaming"] == 0:
                await asyncio.sleep(0.005)
            while len(sink.worker.pool.known_hashes()) < chunks:
                await asyncio.sleep(0.005)
        child.process.send_signal(what)
        await sink.worker.until_ended(key, 10.0)
        if key in sink.worker.aborted:
            error, blames = sink.worker.aborted[key]
            assert isinstance(error, PeerLost) and blames == child.me
        else:
            sink.worker.drop(key)
        await sink.quiet()
        assert len(sink.worker.pool.known_hashes()) >= chunks
        assert pools_mapped() == maps
        async with child_of(sink, 2) as successor:
            again = HandoffKey("r", 2)
            sink.expect(again, 6 * 16 + 5, 1, successor.me)
            successor.ask(again, 6 * 16 + 5, 1)
            await sink.worker.until_ended(again, 10.0)
            assert again in sink.worker.committed and not sink.worker.wrong
            assert sink.worker.receipts[again].transferred_tokens <= (6 - chunks) * 16 + 5
            sink.worker.drop(again)
            await sink.quiet()
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


async def test_a_source_stopped_for_longer_than_its_lease_wakes_up_harmless(sink: Sink) -> None:
    key, other = HandoffKey("r", 1), HandoffKey("s", 1)
    async with child_of(sink, 1) as child:
        sink.expect(key, 101, 1, child.me)
        child.ask(key, 101, 1, pages=1, pause_s=0.05)
        async with asyncio.timeout(10.0):
            while not sink.worker.pool.known_hashes():
                await asyncio.sleep(0.005)
        child.process.send_signal(signal.SIGSTOP)
        await sink.worker.until_ended(key, 10.0)
        await sink.quiet()
        child.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.3)
        assert sink.worker.commits == []
        sink.expect(other, 101, 2, child.me)  # the same incarnation, and it serves again
        child.ask(other, 101, 2)
        await sink.worker.until_ended(other, 10.0)
        assert sink.worker.commits == [other] and not sink.worker.wrong
        sink.worker.drop(other)
        await sink.quiet()
