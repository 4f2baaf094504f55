"""Paths under real sessions: a path that breaks and comes back costs no hand-off, while sessions are opened anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random

import grpc.aio
import pytest
from kvtransfer_pair import LAYOUT, XXH3, Receiving, Sending, prompt_of

from core.clock import monotonic_s
from core.messages import Peer, WorkerId
from kvtransfer import client, server
from kvtransfer.frames import Frames
from kvtransfer.host import Host
from kvtransfer.memory import MemoryFabric, MemoryTransport
from kvtransfer.messages import HandoffKey
from kvtransfer.paths import Paths

P, D = WorkerId("p", 7), WorkerId("d", 8)
PAGES = 65
ONE_HOST = Host("boot", 1, 1)


class Cluster:
    """P and D over gRPC on loopback; what passes for shm and for ucx are fabrics that the test can break."""

    def __init__(self) -> None:
        self.fabrics = {"shm": MemoryFabric(Random(1)), "ucx": MemoryFabric(Random(2))}
        self.frames = {me: Frames.anonymous(LAYOUT, PAGES) for me in (P, D)}
        self.paths = {me: self._paths(me) for me in (P, D)}
        self.d = Receiving(D, self.frames[D], self.paths[D], monotonic_s)
        self.p = Sending(P, self.frames[P], self.paths[P], monotonic_s, Random(3))
        self.dialer = client.HandoffDialer(self.p.link, Random(4))
        self.server = grpc.aio.server(options=server.KEEPALIVE)
        self.renewals = 0
        self._last = 0

    def _paths(self, me: WorkerId) -> Paths:
        inner = {name: MemoryTransport(me, fabric) for name, fabric in self.fabrics.items()}
        return Paths(inner, host=ONE_HOST, clock=monotonic_s, random_bytes=Random(me.incarnation).randbytes)

    async def start(self) -> None:
        for me, paths in self.paths.items():
            await paths.serve(self.frames[me], XXH3)
        sessions = server.add_handoff_service(self.server, self.d.link)

        def renew(peer: WorkerId) -> None:
            self.renewals += 1
            sessions.hang_up(peer)

        self.paths[D].renew = renew
        self.d.link.start(sessions)
        self.p.link.start(self.dialer)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.peer = Peer(D, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        await self.dialer.close()
        await self.server.stop(0.0)
        await self.p.link.stop()
        await self.d.link.stop()
        for me, paths in self.paths.items():
            await paths.close()
            self.frames[me].close()

    async def hand_over(self, tokens: int = 100) -> None:
        """One prompt, from P to D, whole and right."""
        self._last += 1
        key, prompt = HandoffKey(f"r{self._last}", 1), prompt_of(Random(self._last), tokens)
        self.d.expect(key, prompt, Peer(P, ""))
        await self.p.prefill(key, prompt, self.peer)
        await self.d.until_ended(key)
        assert key in self.d.committed and not self.d.aborted and not self.d.wrong, self.d.aborted
        self.d.drop(key)

    def transport(self) -> str:
        (report,) = self.paths[D].snapshot()
        return report.transport


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.start()
    yield cluster
    await cluster.stop()


async def hand_over_until(cluster: Cluster, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not holds():
            await cluster.hand_over()


async def test_a_path_that_breaks_and_comes_back_costs_no_hand_off(cluster: Cluster) -> None:
    await cluster.hand_over()
    assert cluster.transport() == "shm"
    shm = cluster.fabrics["shm"]
    running = asyncio.ensure_future(cluster.hand_over(600))
    await asyncio.sleep(0.005)
    shm.kill(P)
    await running
    assert cluster.transport() == "ucx" and cluster.renewals == 0
    shm.join(P, cluster.frames[P], XXH3)
    await hand_over_until(cluster, lambda: cluster.transport() == "shm")
    assert cluster.renewals == 1
    assert cluster.paths[D].snapshot()[0].trouble == ""


async def test_a_better_path_that_stays_broken_is_tried_ever_more_rarely_beside_the_other(cluster: Cluster) -> None:
    cluster.fabrics["shm"].kill(P)
    await cluster.hand_over()
    assert cluster.transport() == "ucx"
    await hand_over_until(cluster, lambda: cluster.renewals == 2)
    assert cluster.transport() == "ucx" and "shm failed" in cluster.paths[D].snapshot()[0].trouble
