"""Bytes between any two workers, over whatever UCX finds: RDMA, NVLink, TCP. The receiver pulls.

    receiver -> source   ask: tag, page, epoch         a small message
    source -> receiver   the page, under that tag      straight from pool to pool
    source -> receiver   verdict: sent, stale, ...     when the send is over

Each peer has a UCX worker of its own, so that cutting it off takes everything with it that could still write. One
thread drives all of them; this file is the event loop's side of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from core.clock import Clock, monotonic_s
from core.errors import PeerLost
from core.messages import WorkerId
from kvtransfer import ucx_settings
from kvtransfer.device_memory import DeviceMemory
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.transport import Arrival, Piece
from kvtransfer.ucx_asking import Fetch, Pool
from kvtransfer.ucx_library import Context, Region, load
from kvtransfer.ucx_peer import House, Limits, UcxPeer
from kvtransfer.ucx_settings import Fabric
from kvtransfer.ucx_thread import ProgressThread
from kvtransfer.ucx_wire import Descriptor

log = logging.getLogger(__name__)
T = TypeVar("T")

SPIN_S = 50e-6


class UcxTransport:
    """`tls` and `net_devices` are UCX's lists ("tcp", "rc,cuda", "eth0"); `settings` overrides all that we choose.

    Raises ConfigError where ucxx is not installed; `serve` does for settings that UCX does not take.
    """

    name = "ucx"
    settles_on_return = True

    def __init__(
        self,
        *,
        tls: str = "all",
        net_devices: str = "all",
        settings: Mapping[str, str] | None = None,
        fabric: Fabric | None = None,
        limits: Limits | None = None,
        spin_s: float = SPIN_S,
        clock: Clock = monotonic_s,
        random_bytes: Callable[[int], bytes] = os.urandom,
        check_epoch: bool = True,
    ) -> None:
        self._library = load()
        self.settings = ucx_settings.settings(tls, net_devices, settings or {})
        self._fabric = fabric or Fabric()
        self._limits = limits or Limits()
        self._spin_s = spin_s
        self._clock = clock
        self._random_bytes = random_bytes
        self._check_epoch = check_epoch
        self._house: House | None = None
        self._held: memoryview | None = None  # so that the pool stays mapped while we serve
        self._peers: dict[WorkerId, UcxPeer] = {}

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        assert self._house is None, "one pool per transport"
        region = Region.of_pool(frames)
        if region.on_gpu:
            self.settings = ucx_settings.with_gpu(self.settings)
        log.info("UCX %s: %s", self._library.version, " ".join(f"{k}={v}" for k, v in sorted(self.settings.items())))
        thread = ProgressThread(self._clock, self._spin_s)
        try:
            context = await _answer(thread.call(lambda: self._open(frames.device)))
        except BaseException:
            thread.stop()
            raise
        self._held = memoryview(frames.everything) if frames.block is None else None
        self._house = House(
            context=context,
            pool=Pool(frames, region, digest),
            thread=thread,
            clock=self._clock,
            random_bytes=self._random_bytes,
            limits=self._limits,
            check_epoch=self._check_epoch,
            on_lanes=self._fabric.check,
        )

    def _open(self, device: DeviceMemory | None) -> Context:
        """With a worker made and destroyed: only that opens the network's devices. A GPU is current before that."""
        if device is not None:
            device.enter()
        context = self._library.context(self.settings)
        context.worker().close()
        return context

    def _serving(self) -> House:
        assert self._house is not None, "serve first"
        return self._house

    def _peer(self, peer: WorkerId) -> UcxPeer:
        """What we have of it; anew when it was cut off."""
        found = self._peers.get(peer)
        if found is None or found.lost is not None:
            found = self._peers[peer] = UcxPeer(peer, self._serving())
        return found

    async def _do(self, command: Callable[[], T]) -> T:
        return await _answer(self._serving().thread.call(command))

    async def invite(self, peer: WorkerId) -> bytes:
        return await self._do(self._peer(peer).invite)

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        """Raises HandoffError; PeerLost when pages of what the peer was before are being filled: meet again then."""
        theirs = Descriptor.decode(descriptor)
        line = self._peer(peer)
        await self._do(lambda: line.meet(theirs))

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        line = self._peers.get(peer)
        if line is None or line.met is None:
            raise PeerLost(f"{peer} was never met")
        if not pieces:
            return []
        fetch = Fetch(stream, tuple(pieces))
        thread = self._serving().thread
        thread.post(lambda: line.start(fetch))
        ended = asyncio.wrap_future(fetch.ended)
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            thread.post(lambda: line.cancel(fetch))
            await _over(ended)
            raise
        return ended.result()

    async def drain(self, peer: WorkerId, stream: int) -> None:
        line = self._peers.get(peer)
        if line is not None:
            await _answer(await self._do(lambda: line.drain(stream)))

    async def lanes(self, peer: WorkerId) -> tuple[str, ...]:
        """Transport and device of each lane to a peer that was met, as "tcp/eth0"."""
        line = self._peers.get(peer)
        return await self._do(line.lanes) if line is not None else ()

    async def forget(self, peer: WorkerId) -> None:
        line = self._peers.pop(peer, None)
        if line is not None:
            await self._do(lambda: line.cut(PeerLost(f"{peer} was forgotten")))

    async def close(self) -> None:
        if self._house is None:
            return
        for peer in list(self._peers):
            await self.forget(peer)
        thread, self._house = self._house.thread, None
        thread.stop()
        if self._held is not None:
            self._held.release()


async def _answer(asked: Future[T]) -> T:
    """What the thread says. Cancelled, the command is carried out all the same."""
    answer = asyncio.wrap_future(asked)
    try:
        await asyncio.wait([answer])
    except asyncio.CancelledError:
        answer.add_done_callback(_see)
        raise
    return answer.result()


def _see(answer: asyncio.Future[T]) -> None:
    if not answer.cancelled():
        answer.exception()


async def _over(ended: asyncio.Future[list[Arrival]]) -> None:
    """Wait until nothing can land; cancelled again, the answer is the same."""
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            continue
    ended.exception()
