"""Does a path carry bytes unharmed, and how fast? The peer's pattern is fetched into our landing and compared.

The pattern is drawn from a seed that the peer has sent over the control channel, so that a stale mapping, another
worker's pool or frames that lie elsewhere show. No two words of it are alike, so that what is misplaced shows too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.clock import Clock
from core.errors import DigestMismatch
from core.layout import PageLayout
from core.messages import WorkerId
from kvtransfer.digest import SegmentDigest, digest_page
from kvtransfer.frames import Frames, pattern_of
from kvtransfer.transport import PROOF_STREAM, Piece, Transport

WORD_BYTES = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd: multiples of it do not repeat within 2**64 words
LATENCY_FETCHES = 3
MEASURED_BYTES = 8 << 20  # fetched at once to know the bandwidth; by whole pages, within these bounds
MEASURED_PAGES = (2, 32)
MEASURED_S = 0.1  # less is fetched where so much would take longer


@dataclass(frozen=True, slots=True)
class Measure:
    """`latency_s`: of fetching one page, the best of some. `bytes_per_s`: of fetching several at once."""

    latency_s: float
    bytes_per_s: float


def pattern(seed: bytes, size: int) -> bytes:
    """What the pattern frame of a worker holds."""
    words = np.arange(1, -(-size // WORD_BYTES) + 1, dtype=np.uint64) * GOLDEN
    words ^= np.uint64(int.from_bytes(seed, "little"))
    words ^= words >> np.uint64(29)
    return words.tobytes()[:size]


def pattern_digests(seed: bytes, layout: PageLayout, digest: SegmentDigest) -> bytes:
    """What a transport must say has arrived."""
    return digest_page(memoryview(pattern(seed, layout.page_bytes)), layout, 0, digest)


class Proof:
    """Proves one path of one peer, whose pool has `pages`. Nobody else may use the landing meanwhile."""

    def __init__(
        self, transport: Transport, peer: WorkerId, pages: int, frames: Frames, expected: bytes, clock: Clock
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._frames = frames
        self._piece = Piece(pattern_of(pages), 0, frames.landing)
        self._expected = expected
        self._clock = clock

    async def run(self) -> Measure:
        """Raises HandoffError: PeerLost, or DigestMismatch when other bytes arrived."""
        await self._fetch(1)  # opens what has to be opened, so that it is not measured
        latency_s = min([await self._fetch(1) for _ in range(LATENCY_FETCHES)])
        size = self._frames.layout.page_bytes
        fewest, most = MEASURED_PAGES
        wanted = max(fewest, min(most, MEASURED_BYTES // size))
        pages = max(1, min(wanted, int(MEASURED_S / max(latency_s, 1e-9))))
        return Measure(latency_s, pages * size / max(await self._fetch(pages), 1e-9))

    async def _fetch(self, pages: int) -> float:
        """Seconds."""
        frames = self._frames  # what an earlier proof has left would prove anything
        frames.write(frames.landing, bytes(frames.layout.page_bytes))
        began_s = self._clock()
        arrivals = await self._transport.fetch(self._peer, PROOF_STREAM, [self._piece] * pages)
        took_s = self._clock() - began_s
        for arrival in arrivals:
            if not isinstance(arrival, bytes):
                raise arrival
            if arrival != self._expected:
                raise DigestMismatch(f"the pattern of {self._peer} arrived with other bytes")
        return took_s
