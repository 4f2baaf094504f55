"""A prefill and a decode worker without engines in one process, over a real transport and real gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import grpc.aio
from kvtransfer_pair import XXH3, Receiving, Sending

from core.clock import monotonic_s
from core.layout import PageLayout
from core.messages import Peer, WorkerId
from kvtransfer import server
from kvtransfer.client import HandoffDialer
from kvtransfer.digest import XXH3_64
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.frames import Frames
from kvtransfer.ports import NoCounters
from tests.chaos.damage import Damage, DamagingDialer, DamagingTransport
from tests.chaos.transports import make_transport

P, D = WorkerId("p", 1), WorkerId("d", 1)
PAGES = 257


class Faults(NoCounters):
    """The counter of faults, as the workers export it."""

    def __init__(self) -> None:
        self.by_code: Counter[str] = Counter()

    def fault(self, peer: WorkerId, code: str) -> None:
        self.by_code[code] += 1


@dataclass
class RealPair:
    p: Sending
    d: Receiving
    damage: Damage
    faults: Faults
    to_d: Peer

    async def quiet(self, within_s: float = 30.0) -> None:
        """Nothing is held any more, and the books of both pools add up."""
        async with asyncio.timeout(within_s):
            while not (self.p.link.idle and self.d.link.idle):
                await asyncio.sleep(0.02)
        for pool in (self.p.pool, self.d.pool):
            pool.check()
            counts = pool.counts()
            assert counts["owned"] == counts["leased"] == counts["quarantined"] == 0, counts


@asynccontextmanager
async def real_pair(transport: str, layout: PageLayout, seed: int) -> AsyncIterator[RealPair]:
    fingerprint, faults = Fingerprint("model", layout, XXH3_64), Faults()
    p_frames, d_frames = Frames.shared(layout, PAGES), Frames.shared(layout, PAGES)
    damage = Damage(Random(seed), p_frames, d_frames)
    p_transport = make_transport(transport)
    d_transport = DamagingTransport(make_transport(transport), damage)
    await p_transport.serve(p_frames, XXH3)
    await d_transport.serve(d_frames, XXH3)
    p = Sending(P, p_frames, p_transport, monotonic_s, Random(seed), fingerprint=fingerprint, offload=asyncio.to_thread)
    d = Receiving(D, d_frames, d_transport, monotonic_s, fingerprint=fingerprint, counters=faults)
    service = grpc.aio.server(options=server.KEEPALIVE)
    d.link.start(server.add_handoff_service(service, d.link))
    to_d = Peer(D, f"127.0.0.1:{service.add_insecure_port('127.0.0.1:0')}")
    await service.start()
    dialer = HandoffDialer(p.link, Random(seed))
    p.link.start(DamagingDialer(dialer, damage))
    try:
        yield RealPair(p, d, damage, faults, to_d)
    finally:
        await dialer.close()
        await p.link.stop()
        await service.stop(0.0)
        await d.link.stop()
        await p_transport.close()
        await d_transport.close()
        p_frames.close()
        d_frames.close()
