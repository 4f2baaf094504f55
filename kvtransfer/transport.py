"""What carries the bytes: the verbs that every transport has, and what each promises. The receiver pulls.

A transport checks bounds and epoch; the protocol checks place, digest and lease. One contract test runs over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.errors import HandoffError
from core.messages import WorkerId
from kvtransfer.frames import Frames


@dataclass(frozen=True, slots=True)
class Piece:
    """One page to move: (source page, epoch) names the content, `target_page` is a frame of the receiver's pool."""

    source_page: int
    epoch: int
    target_page: int


Arrival = tuple[int, ...] | HandoffError  # the digests of what now lies in the target page, or why nothing valid does


class Transport(Protocol):
    """Moves pages between pools. All methods belong to one event loop.

    `settles_on_return`: an operation of this transport that has returned or raised, in whatever way, writes no more.
    Where it is False, an operation that raised may go on writing until the source has drained or the peer is forgotten.
    """

    name: str
    settles_on_return: bool

    async def serve(self, frames: Frames) -> bytes:
        """Take this pool as ours: peers read it, and fetches land in it. Returns the descriptor for peers.

        The descriptor is plain data with a version in it. Only workers may see it.
        """
        ...

    async def fetch(
        self, peer: WorkerId, descriptor: bytes, stream: int, pieces: Sequence[Piece]
    ) -> list[Arrival]:
        """Bring the pages, in any order, and say for each what arrived: digests, or OutOfBounds, or StalePage.

        Raises PeerLost. Ends soon after it is cancelled, also when the peer has stopped.
        """
        ...

    async def drain(self, peer: WorkerId, stream: int) -> None:
        """At the source: return when nothing of ours will write into the peer's pages under this stream any more."""
        ...

    async def forget(self, peer: WorkerId) -> None:
        """Cut the peer off: running fetches from it raise PeerLost; on return nothing of it is mapped or can land.

        A later fetch from the same incarnation begins anew.
        """
        ...

    async def close(self) -> None:
        """Forget every peer and stop serving. Transfers in flight raise PeerLost."""
        ...
