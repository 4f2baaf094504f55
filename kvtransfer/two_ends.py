"""One transport for both ends of a worker: when one of them cuts a peer off, the other one hears of it at once.

A transport knows a peer once, whichever way pages go. So what one end forgets is gone for the other too: its hand-offs
with that peer fail, its session is hung up, and each end meets the peer anew when the cut is done. A session whose
greeting was under way meanwhile does not come up: what it was told of the transport is worth nothing any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from core.errors import BatonError, PeerLost
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.transport import Arrival, Piece, Transport

PeerGone = Callable[[WorkerId, BatonError], None]


class TwoEnds:
    """`source` and `receiver` are the transport as each end sees it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.source = EndTransport(self, dials=True)
        self.receiver = EndTransport(self, dials=False)
        self._cuts: dict[WorkerId, asyncio.Task[None]] = {}

    async def cut(self, peer: WorkerId, by: EndTransport) -> None:
        """Both ends may want it at once: it is done once, and both wait until it is done."""
        running = self._cuts.get(peer)
        if running is None:
            running = self._cuts[peer] = asyncio.get_running_loop().create_task(self.transport.forget(peer))
            running.add_done_callback(lambda _: self._cuts.pop(peer, None))
            by.forgets(peer)
            (self.receiver if by is self.source else self.source).lost(peer)
        await asyncio.shield(running)

    async def until_cut(self, peer: WorkerId) -> None:
        while peer in self._cuts:
            await asyncio.wait([self._cuts[peer]])


class EndTransport:
    """A Transport for one of two ends. `peer_gone` is that of the end's link, once it is made."""

    def __init__(self, both: TwoEnds, *, dials: bool) -> None:
        self._both = both
        self._dials = dials
        self._greeted: set[WorkerId] = set()  # the first half of a greeting is done: an invitation, or what it said
        self.peer_gone: PeerGone = _nothing

    @property
    def name(self) -> str:
        return self._both.transport.name

    @property
    def settles_on_return(self) -> bool:
        return self._both.transport.settles_on_return

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        await self._both.transport.serve(frames, digest)

    async def invite(self, peer: WorkerId) -> bytes:
        """A source invites first."""
        await self._both.until_cut(peer)
        if self._dials:
            self._greeted.add(peer)
        descriptor = await self._both.transport.invite(peer)
        self._check(peer)
        return descriptor

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        """A receiver is told first."""
        await self._both.until_cut(peer)
        if not self._dials:
            self._greeted.add(peer)
        self._check(peer)
        await self._both.transport.meet(peer, descriptor)
        self._check(peer)

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        return await self._both.transport.fetch(peer, stream, pieces)

    async def drain(self, peer: WorkerId, stream: int) -> None:
        await self._both.transport.drain(peer, stream)

    async def forget(self, peer: WorkerId) -> None:
        await self._both.cut(peer, self)

    async def close(self) -> None:
        await self._both.transport.close()

    def forgets(self, peer: WorkerId) -> None:
        self._greeted.discard(peer)

    def lost(self, peer: WorkerId) -> None:
        """The other end has cut it off."""
        self.forgets(peer)
        self.peer_gone(peer, PeerLost(f"{peer} was cut off"))

    def _check(self, peer: WorkerId) -> None:
        if peer not in self._greeted:
            raise PeerLost(f"{peer} was cut off while it was greeted")


def _nothing(peer: WorkerId, error: BatonError) -> None:
    """There is no link yet."""
