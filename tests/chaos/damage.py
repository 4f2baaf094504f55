"""Changes pages between the digest and the check, in four places, and keeps the books of what it did.

    source       P's page is changed after its digest was computed, and before the receiver hears of the page
    in flight    what is read is other than what P holds before and after: the page is changed for one fetch only
    destination  the page has landed whole, and D's memory is changed before the check
    stale        P has given the page up (its epoch is raised) and filled it anew, between Ready and the fetch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

import numpy as np
from kvtransfer_pair import content

from core.errors import StalePage
from core.messages import Peer, WorkerId
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.messages import HandoffKey, Message, PageEntry, Ready, Sealed
from kvtransfer.transport import Arrival, Piece, Transport


class Place(Enum):
    SOURCE = "source"
    FLIGHT = "in flight"
    DESTINATION = "destination"
    STALE = "stale"


PERSISTS = frozenset({Place.SOURCE, Place.STALE})  # a second fetch finds it too: the hand-off fails


@dataclass(frozen=True)
class Plan:
    """What one hand-off has to bear: one page for good, or some pages in passing."""

    place: Place
    position: int = 0  # of the page that is changed for good
    share: float = 0.5  # of the pages that are changed in passing


def change(page: memoryview, random: Random) -> None:
    """One bit, one byte, a cache line of zeros, or a half moved by a byte: always other bytes than before."""
    before, at = bytes(page), random.randrange(len(page))
    match random.randrange(4):
        case 0:
            page[at] ^= 1 << random.randrange(8)
        case 1:
            page[at] = (page[at] + random.randrange(1, 256)) % 256
        case 2:
            start = at // 64 * 64
            page[start : start + 64] = bytes(len(page[start : start + 64]))
        case _:
            half = len(page) // 2
            page[1 : half + 1] = before[:half]
    if bytes(page) == before:  # zeros over zeros
        page[at] ^= 1


class Damage:
    """What is planned, what was done, and what each page of the source should hold."""

    def __init__(self, random: Random, source: Frames, target: Frames) -> None:
        self.random = random
        self.source = source
        self.target = target
        self.plans: dict[HandoffKey, Plan] = {}
        self.done: Counter[Place] = Counter()
        self.wrong = 0  # arrivals with other bytes than the source wrote, seen by comparing all of them
        self.stale = 0  # arrivals that the transport itself refused
        self._said: dict[tuple[int, int], tuple[HandoffKey, PageEntry]] = {}  # by source page and epoch
        self._fetched: set[tuple[int, int]] = set()
        self._doomed: set[int] = set()  # target pages that are changed when they have landed

    # --- at the source: a page has its digest, and the message is about to leave ------------------------------

    def announced(self, message: Message) -> None:
        for entry in _entries(message):
            if (entry.page, entry.epoch) in self._said:
                continue  # said again
            self._said[entry.page, entry.epoch] = message.key, entry
            plan = self.plans.get(message.key)
            if plan is not None and plan.place in PERSISTS and plan.position == entry.position:
                self._for_good(plan.place, entry)

    def _for_good(self, place: Place, entry: PageEntry) -> None:
        self.done[place] += 1
        page = self.source.page(entry.page)
        if place is Place.STALE:
            self.source.epochs[entry.page] += 1
            page[:] = content(self.random.randbytes(16), self.source.layout)
        else:
            change(page, self.random)

    # --- at the receiver: around a fetch, and before the check ------------------------------------------------

    def before(self, pieces: Sequence[Piece]) -> dict[int, bytes]:
        """Change what will travel; returns what the source is to hold again afterwards, by page."""
        kept: dict[int, bytes] = {}
        for piece in pieces:
            key, _ = self._said[piece.source_page, piece.epoch]
            plan = self.plans.get(key)
            first = (piece.source_page, piece.epoch) not in self._fetched
            self._fetched.add((piece.source_page, piece.epoch))
            if plan is None or plan.place in PERSISTS or not first or self.random.random() > plan.share:
                continue
            self.done[plan.place] += 1
            if plan.place is Place.DESTINATION:
                self._doomed.add(piece.target_page)
            else:
                page = self.source.page(piece.source_page)
                kept[piece.source_page] = bytes(page)
                change(page, self.random)
        return kept

    def after(self, kept: dict[int, bytes], pieces: Sequence[Piece], arrivals: Sequence[Arrival]) -> None:
        for number, was in kept.items():
            self.source.page(number)[:] = was
        for piece, arrival in zip(pieces, arrivals, strict=True):
            _, entry = self._said[piece.source_page, piece.epoch]
            self.stale += isinstance(arrival, StalePage)
            landed = self.target.page(piece.target_page)
            self.wrong += isinstance(arrival, bytes) and landed != content(entry.block_hash, self.target.layout)

    def digest(self, of: SegmentDigest) -> SegmentDigest:
        """The digest as the receiver computes it: over a page that may just have been changed."""
        base = _address(self.target.buffer)

        def changed_first(segment: memoryview) -> bytes:
            page = (_address(segment) - base) // self.target.layout.page_bytes
            if page in self._doomed:
                self._doomed.discard(page)
                change(segment, self.random)
            return of(segment)

        return changed_first


def _entries(message: Message) -> Sequence[PageEntry]:
    if isinstance(message, Ready):
        return message.pages
    return (message.tail,) if isinstance(message, Sealed) and message.tail else ()


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


class DamagingDialer:
    """The source's sessions: what they carry is noted, and pages are changed behind it."""

    def __init__(self, dialer: Any, damage: Damage) -> None:
        self._dialer = dialer
        self._damage = damage

    def dial(self, peer: Peer) -> None:
        self._dialer.dial(peer)

    def send(self, worker: WorkerId, message: Message) -> None:
        self._damage.announced(message)
        self._dialer.send(worker, message)

    def hang_up(self, worker: WorkerId) -> None:
        self._dialer.hang_up(worker)


class DamagingTransport:
    """The receiver's transport. All but `fetch` and the digest is its own."""

    def __init__(self, inner: Transport, damage: Damage) -> None:
        self._inner = inner
        self._damage = damage
        self.name = inner.name
        self.settles_on_return = inner.settles_on_return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def serve(self, frames: Frames, digest: SegmentDigest) -> None:
        await self._inner.serve(frames, self._damage.digest(digest))

    async def fetch(self, peer: WorkerId, stream: int, pieces: Sequence[Piece]) -> list[Arrival]:
        kept = self._damage.before(pieces)
        arrivals: list[Arrival] = []
        try:
            arrivals = await self._inner.fetch(peer, stream, pieces)
        finally:
            self._damage.after(kept, pieces if arrivals else (), arrivals)
        return arrivals
