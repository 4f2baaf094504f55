"""What carries the bytes: the verbs that every transport has, and what each promises. The receiver pulls.

A transport checks bounds and epoch; the protocol checks place, digest and lease. One contract test runs over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.errors import HandoffError
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames

PROOF_STREAM = 0  # of fetches that prove a path: only from the pattern, only to the landing. Hand-offs count from 1


@dataclass(frozen=True, slots=True)
class Piece:
    """One page to move: (source page, epoch) names the content, `target_page` is a frame of the receiver's pool."""

    source_page: int
    epoch: int
    target_page: int


Arrival = bytes | HandoffError  # the digests of what now lies in the target page, or why nothing valid does


class Transport(Protocol):
    """Moves pages between pools. All methods belong to one event loop.

    `settles_on_return`: an operation of this transport that has returned or raised, in whatever way, writes no more.
    Where it is False, an operation that raised may go on writing until the source has drained or the peer is forgotten.
    """

    @property
    def name(self) -> str: ...

    @property
    def settles_on_return(self) -> bool: ...

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        """Take this pool as ours, once, before anything else: peers read it, and fetches land in it."""
        ...

    async def invite(self, peer: WorkerId) -> bytes:
        """What this one peer needs to reach us: plain data with a version in it, at most a few KiB.

        It goes to the peer over the control channel, in the first message of a session, and nobody else may see it.
        The same until the peer is forgotten.
        """
        ...

    async def meet(self, peer: WorkerId, descriptor: bytes) -> None:
        """Take in what the peer's `invite` said. Another descriptor than before means that the peer began anew.

        Raises HandoffError for what no version of ours has written.
        """
        ...

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        """Bring the pages, in any order, and say for each what arrived: digests, or OutOfBounds, or StalePage.

        Under PROOF_STREAM, and only there, the source page is the pattern and the target the landing, at epoch 0.

        Raises PeerLost; also for a peer that was never met. Ends soon after it is cancelled, even when the peer has
        stopped.
        """
        ...

    async def drain(self, peer: WorkerId, stream: int) -> None:
        """At the source: return when nothing of ours will write into the peer's pages under this stream any more."""
        ...

    async def forget(self, peer: WorkerId) -> None:
        """Cut the peer off: running fetches from it raise PeerLost; on return nothing of it is mapped or can land.

        The same incarnation can be invited and met again.
        """
        ...

    async def close(self) -> None:
        """Forget every peer and stop serving. Transfers in flight raise PeerLost."""
        ...


@runtime_checkable
class Laned(Protocol):
    """A transport that runs over other things: devices and protocols."""

    async def lanes(self, peer: WorkerId) -> tuple[str, ...]:
        """What carries the bytes of this peer, in the transport's own words; empty while it is not known."""
        ...


async def lanes_of(transport: Transport, peer: WorkerId) -> str:
    return ", ".join(await transport.lanes(peer)) if isinstance(transport, Laned) else ""
