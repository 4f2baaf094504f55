"""The receiver's half of a pair: which pages are asked for, where they land, and when a fetch is over.

A page's receive is posted when its message has arrived, never before: a page that was asked for and does not come
has nothing posted that could be filled later. So a cancelled fetch waits only for pages that are being filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from core.errors import HandoffError, OutOfBounds, PeerLost, StalePage
from kvtransfer.digest import SegmentDigest
from kvtransfer.frames import Frames
from kvtransfer.transport import PROOF_STREAM, Arrival, Piece
from kvtransfer.ucx_calls import Request
from kvtransfer.ucx_library import Message, Region, Worker
from kvtransfer.ucx_wire import MAX_ENTRIES, OUT_OF_BOUNDS, SENT, STALE, Ask, Verdict

TAG_BITS = 32  # the lower half counts, the upper half is the pair's secret
LOOK_AHEAD = 4  # pages being filled that are looked at in a turn
MAX_FETCHES = 4096  # that wait, of one peer


@dataclass(slots=True, eq=False)
class Fetch:
    """One call of `fetch`. `ended` is set when nothing of it can land any more."""

    stream: int
    pieces: tuple[Piece, ...]
    ended: Future[list[Arrival]] = field(default_factory=Future)
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    asked: int = 0  # pieces
    filling: int = 0  # pages whose receive is posted
    began_s: float = 0.0
    error: HandoffError | None = None  # it was given up, at `gave_up_s`
    gave_up_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Page:
    """One page that was asked for."""

    fetch: Fetch
    number: int
    receive: Request | None = None
    landed: bool = False
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Our own memory: where pages land, and where they are sent from."""

    frames: Frames
    region: Region
    digest: SegmentDigest

    def page(self, index: int) -> Region:
        size = self.frames.layout.page_bytes
        return self.region.part(index * size, size)

    def digests(self, index: int) -> bytes:
        return self.frames.digests([index], self.digest)[0]


class Asking:
    """`say` sends asks to the source: a stream and what is wanted under it. Errors raised mean: cut the peer off."""

    def __init__(self, pool: Pool, secret: int, window: int, say: Callable[[int, Sequence[Ask]], None]) -> None:
        self._pool = pool
        self._secret = secret
        self._window = window
        self._say = say
        self._count = 0
        self._fetches: deque[Fetch] = deque()  # that have pieces to ask for
        self._running: set[Fetch] = set()
        self._pages: dict[int, _Page] = {}  # by tag
        self._filling: dict[int, _Page] = {}  # by tag: receives that are posted
        self._abandoned: set[int] = set()  # tags of pages that nobody wants any more, until their verdict
        self._scrap = Region.of(memoryview(bytearray(1)))
        self.bytes_landed = 0

    @property
    def waiting(self) -> bool:
        """The peer owes us something."""
        return bool(self._pages or self._abandoned)

    @property
    def filling(self) -> bool:
        """A receive is posted, so that our pages are being written to."""
        return bool(self._filling)

    def start(self, fetch: Fetch, now_s: float) -> None:
        if len(self._running) >= MAX_FETCHES:
            fetch.ended.set_exception(HandoffError(f"{MAX_FETCHES} fetches of one peer are waiting"))
            return
        fetch.began_s = now_s
        self._running.add(fetch)
        self._fetches.append(fetch)
        self._ask()
        self._finish(fetch)

    def _ask(self) -> None:
        """Fill the window, in few messages: when it is empty, or half of it is free."""
        under_way = len(self._pages) + len(self._abandoned)
        if under_way and under_way > self._window // 2:
            return
        while self._fetches and (room := self._window - len(self._pages) - len(self._abandoned)) > 0:
            fetch = self._fetches[0]
            asks = self._next(fetch, min(room, MAX_ENTRIES))
            if fetch.asked == len(fetch.pieces):
                self._fetches.popleft()
            if asks:
                self._say(fetch.stream, asks)
            else:
                self._finish(fetch)  # all were refused here

    def _next(self, fetch: Fetch, room: int) -> list[Ask]:
        asks: list[Ask] = []
        while len(asks) < room and fetch.asked < len(fetch.pieces):
            number, piece = fetch.asked, fetch.pieces[fetch.asked]
            fetch.asked += 1
            refused = self._impossible(piece, proof=fetch.stream == PROOF_STREAM)
            if refused is not None:
                fetch.arrivals[number] = refused
                continue
            self._count = (self._count + 1) % (1 << TAG_BITS)
            tag = self._secret << TAG_BITS | self._count
            self._pages[tag] = _Page(fetch, number)
            asks.append(Ask(tag, piece.source_page, piece.epoch))
        return asks

    def _impossible(self, piece: Piece, *, proof: bool) -> HandoffError | None:
        try:
            self._pool.frames.check_target(piece.target_page, proof=proof)
        except OutOfBounds as error:
            return error
        if not -(1 << 63) <= piece.source_page < 1 << 63:
            return OutOfBounds(f"page {piece.source_page} of any pool")
        if not 0 <= piece.epoch < 1 << 64:
            return StalePage(f"no page is at epoch {piece.epoch}")
        return None

    # --- what comes ------------------------------------------------------------------------------------------

    def arrived(self, message: Message, worker: Worker) -> None:
        """A message that is no control message: a page, or something to be rid of."""
        page = self._pages.get(message.tag)
        if page is None or page.receive is not None:
            self._eat(message, worker)
            return
        target = page.fetch.pieces[page.number].target_page
        if message.length != self._pool.frames.layout.page_bytes:
            self._eat(message, worker)
            raise HandoffError(f"a page of {message.length} bytes")
        page.receive = worker.receive(message, self._pool.page(target))
        page.fetch.filling += 1
        self._filling[message.tag] = page

    def _eat(self, message: Message, worker: Worker) -> None:
        """Receive it into a byte: that ends it at both ends, and the rest is dropped."""
        worker.receive(message, self._scrap)

    def poll(self) -> bool:
        landed = self._landed()
        for tag, page in landed:
            del self._filling[tag]
            page.fetch.filling -= 1
            if page.receive is not None and page.receive.failed:
                raise PeerLost("a page has broken off")
            page.landed = True
            self.bytes_landed += self._pool.frames.layout.page_bytes
            self._settle(tag, page)
        return bool(landed)

    def _landed(self) -> list[tuple[int, _Page]]:
        """Pages fill in about the order of their receives: the first few are looked at, each look costs."""
        landed, unfinished = [], 0
        for tag, page in self._filling.items():
            if page.receive is not None and page.receive.done:
                landed.append((tag, page))
            elif (unfinished := unfinished + 1) == LOOK_AHEAD:
                break
        return landed

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            page = self._pages.get(verdict.tag)
            if page is None:
                self._check_old(verdict.tag)
                self._abandoned.discard(verdict.tag)
            elif page.verdict is not None or verdict.what not in (SENT, OUT_OF_BOUNDS, STALE):
                raise HandoffError(f"a verdict that cannot be: {verdict.what}")
            else:
                page.verdict = verdict
                self._settle(verdict.tag, page)
        self._ask()

    def _check_old(self, tag: int) -> None:
        """Raise HandoffError for a tag under which nothing was ever asked for."""
        if tag >> TAG_BITS != self._secret:
            raise HandoffError("a verdict on a page that was not asked for")

    def _settle(self, tag: int, page: _Page) -> None:
        """Done with a page when its bytes and its verdict are here, in whatever order."""
        verdict, fetch = page.verdict, page.fetch
        if page.receive is not None and not page.landed:
            return
        if verdict is None or (verdict.what == SENT and not page.landed):
            if fetch.error is not None and page.landed:
                self._abandon(tag)
                self._finish(fetch)
            return
        del self._pages[tag]
        fetch.arrivals[page.number] = self._arrival(fetch.pieces[page.number], verdict)
        self._finish(fetch)
        self._ask()

    def _arrival(self, piece: Piece, verdict: Verdict) -> Arrival:
        if verdict.what == OUT_OF_BOUNDS:
            return OutOfBounds(f"page {piece.source_page} of the peer's {verdict.found}")
        if verdict.what == STALE:
            return StalePage(f"page {piece.source_page} is at epoch {verdict.found}, not {piece.epoch}")
        return self._pool.digests(piece.target_page)

    # --- how a fetch ends ------------------------------------------------------------------------------------

    def _finish(self, fetch: Fetch) -> None:
        if fetch not in self._running or fetch.filling:
            return
        if fetch.error is not None:
            self._running.discard(fetch)
            fetch.ended.set_exception(fetch.error)
        elif len(fetch.arrivals) == len(fetch.pieces):
            self._running.discard(fetch)
            fetch.ended.set_result([fetch.arrivals[number] for number in range(len(fetch.pieces))])

    def give_up(self, fetch: Fetch, error: HandoffError, now_s: float) -> None:
        """Its pages that are not being filled are forgotten now; `ended` is set when the others are."""
        if fetch not in self._running or fetch.error is not None:
            return
        fetch.error, fetch.gave_up_s = error, now_s
        if fetch in self._fetches:
            self._fetches.remove(fetch)
        for tag, page in list(self._pages.items()):
            if page.fetch is fetch and tag not in self._filling:
                self._abandon(tag)
        self._finish(fetch)

    def _abandon(self, tag: int) -> None:
        page = self._pages.pop(tag)
        if page.verdict is None:
            self._abandoned.add(tag)

    def overdue(self, now_s: float, limit_s: float, patience_s: float) -> bool:
        """Give up fetches older than the limit; whether one that was given up is filled for too long."""
        for fetch in list(self._running):
            if now_s - fetch.began_s > limit_s:
                self.give_up(fetch, PeerLost(f"not over after {limit_s} s"), now_s)
        return any(fetch.error is not None and now_s - fetch.gave_up_s > patience_s for fetch in self._running)

    def lost(self, error: HandoffError) -> None:
        """Worker and endpoint are gone: nothing can land."""
        fetches = list(self._running)
        for state in (self._running, self._fetches, self._pages, self._filling, self._abandoned):
            state.clear()
        for fetch in fetches:
            fetch.ended.set_exception(fetch.error or error)
