"""Which bytes count: pages are fetched into quarantined frames, compared with their digests, and tried once more.

A page that an operation may write into is quarantined from the post of the operation until it can write no more:
until it has returned and cannot write, the source has said Drained, or the transport to that peer is destroyed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import DigestMismatch, HandoffError
from kvtransfer.events import FetchEnded, StartFetch
from kvtransfer.messages import HandoffKey, PageEntry
from kvtransfer.ports import Counters, Pages, Reservations
from kvtransfer.receiving import Receiving
from kvtransfer.transport import Arrival, Piece

FETCHES = 2  # of a page whose bytes were wrong, until the source has failed


@dataclass(frozen=True, slots=True)
class Guards:
    """What keeps wrong bytes out. Only tests switch one off, to see that it is missed."""

    place: bool = True
    digest: bool = True
    quarantine: bool = True


@dataclass(frozen=True, slots=True)
class _Operation:
    """A fetch that was posted: the position that each piece is for, and where it lands."""

    key: HandoffKey
    entries: tuple[PageEntry, ...]
    targets: tuple[int, ...]


class Intake:
    """The operations of one receiver, and the pages that they may touch."""

    def __init__(self, pages: Pages, reservations: Reservations, counters: Counters, guards: Guards) -> None:
        self._pages = pages
        self._reservations = reservations
        self._counters = counters
        self._guards = guards
        self._operations: dict[int, _Operation] = {}
        self._last = 0

    @property
    def idle(self) -> bool:
        return not self._operations

    def key_of(self, operation: int) -> HandoffKey:
        return self._operations[operation].key

    def post(self, record: Receiving, entries: Sequence[PageEntry], now_s: float) -> StartFetch:
        """Fetch these pages into the frames that are theirs by position."""
        self._last += 1  # a number never used before: a late answer to an older one is nobody's
        targets = tuple(record.pages[entry.position] for entry in entries)
        self._operations[self._last] = _Operation(record.key, tuple(entries), targets)
        record.posted(self._last, now_s)
        if self._guards.quarantine:
            for page in targets:
                self._pages.quarantine(page)
        pieces = tuple(Piece(entry.page, entry.epoch, page) for entry, page in zip(entries, targets, strict=True))
        return StartFetch(self._last, record.peer, record.stream, pieces)

    def ended(self, record: Receiving, event: FetchEnded, now_s: float) -> list[PageEntry]:
        """Take in what has arrived; returns what is to be fetched again. Raises when the source cannot give a page."""
        operation = self._operations.pop(event.operation)
        record.returned(event.operation, now_s)
        if event.settled or record.drained:
            self._settle(operation.targets)
        else:
            record.haunted += operation.targets
        if record.ended:
            return []
        if event.error is not None:
            raise self._fault(record, event.error)
        again, failed = self._take_in(record, zip(operation.entries, event.arrivals, strict=True))
        if failed is not None:
            raise failed
        for entry in again:
            self._replace(record, entry)
        return again

    def _take_in(
        self, record: Receiving, arrived: Iterable[tuple[PageEntry, Arrival]]
    ) -> tuple[list[PageEntry], HandoffError | None]:
        """Every page that is right is kept, whatever has become of the others."""
        again: list[PageEntry] = []
        failed: HandoffError | None = None
        for entry, arrival in arrived:
            if isinstance(arrival, HandoffError):
                failed = arrival
                self._fault(record, arrival)
            elif arrival == entry.digests or not self._guards.digest:
                self._keep(record, entry)
            else:
                again.append(entry)
        return again, failed

    def _keep(self, record: Receiving, entry: PageEntry) -> None:
        record.verified.add(entry.position)
        if entry.position < record.places.full_pages:
            self._pages.register(record.pages[entry.position], entry.block_hash)

    def _replace(self, record: Receiving, entry: PageEntry) -> None:
        """The bytes were wrong: a fresh frame waits for better ones, once."""
        position = entry.position
        error = DigestMismatch(f"page {position} arrived with other bytes than {record.peer} wrote")
        self._fault(record, error)
        tries = record.tries[position] = record.tries.get(position, 0) + 1
        fresh = self._reservations.fresh_page(record.key) if tries < FETCHES else None
        if fresh is None:
            raise error
        self._pages.release(record.pages[position])
        record.pages[position] = fresh

    def _fault(self, record: Receiving, error: HandoffError) -> HandoffError:
        self._counters.fault(record.peer, error.code)
        return error

    def release(self, record: Receiving) -> None:
        """Give every page up at once: the pool keeps back those that something may still write into."""
        while record.pages:  # last first: a prefix outlives its continuation in the cache
            self._pages.release(record.pages.pop())

    def lay(self, record: Receiving) -> None:
        """The source writes no more: operations that have returned are over."""
        record.drained = True
        self._settle(record.haunted)
        record.haunted.clear()

    def _settle(self, targets: Sequence[int]) -> None:
        if self._guards.quarantine:
            for page in targets:
                self._pages.settle(page)
