"""One hand-off as its receiver knows it: what has come, what is on its way, what is verified."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.errors import BatonError, DeadlineExceeded, HandoffError, PlaceMismatch
from core.messages import WorkerId
from kvtransfer.events import Committed
from kvtransfer.messages import Close, Fetch, HandoffKey, PageEntry, Refused, Sealed
from kvtransfer.outbox import Heard
from kvtransfer.places import Places
from kvtransfer.states import ENDED, Deadlines, State


@dataclass(slots=True)
class Receiving:
    key: HandoffKey
    peer: WorkerId
    places: Places
    until_s: float  # the request's deadline
    moved_s: float  # last progress
    entered_s: float  # the beginning of its state
    stream: int
    loan: bool = False
    ticket: bytes = b""
    state: State = State.QUEUED
    choices: int = 0
    prefix_pages: int = 0
    pages: list[int] = field(default_factory=list)  # by position; owned until they are passed on or released
    heard: Heard = field(default_factory=Heard)
    entries: dict[int, PageEntry] = field(default_factory=dict)  # by position
    tries: dict[int, int] = field(default_factory=dict)  # fetches that brought the wrong bytes, by position
    verified: set[int] = field(default_factory=set)  # positions
    running: set[int] = field(default_factory=set)  # operations that have not returned
    haunted: list[int] = field(default_factory=list)  # pages of operations that returned and may still write
    sealed: Sealed | None = None
    sealed_s: float = 0.0
    hidden_pages: int = 0  # verified when the seal was heard
    fetching_s: float = 0.0  # since when an operation has been running
    transfer_s: float = 0.0  # how long operations have run, those that run together counted once
    number: int = 0  # of our last message
    final: Close | Refused | None = None  # said until it is answered
    said_s: float = 0.0
    drained: bool = False  # the source writes no more
    held_back: bool = False  # it was aborted, and operations may still touch its pages

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def whole(self) -> bool:
        """Everything has come and is verified."""
        return self.sealed is not None and len(self.verified) == self.places.pages - self.prefix_pages

    @property
    def clear(self) -> bool:
        """No operation of it can touch a page any more."""
        return not self.running and not self.haunted

    def shorten(self, tokens: int) -> None:
        """A lender may have less than it was asked for: the first whole pages of it."""
        shorter = 0 < tokens < self.places.prompt_tokens and tokens % self.places.page_size == 0
        if self.loan and self.state is State.QUEUED and shorter:
            self.places = self.places.first(tokens)

    def is_news(self, entry: PageEntry, *, tail: bool, check_place: bool) -> bool:
        """Whether this page is to be fetched. Raises PlaceMismatch when it is not this prompt's page."""
        if check_place:
            self.places.check(entry.position, entry.block_hash)
        if tail != (entry.position == self.places.full_pages):
            raise PlaceMismatch(f"page {entry.position} came as {'the tail' if tail else 'a full page'}")
        known = self.entries.get(entry.position)
        if known is not None and known != entry:
            raise PlaceMismatch(f"page {entry.position} was said twice, and differently")
        if known is not None or entry.position < self.prefix_pages:
            return False
        self.entries[entry.position] = entry
        return True

    def check_seal(self, message: Sealed) -> None:
        """Raises HandoffError unless it seals this prompt."""
        places = self.places
        if (message.full_pages, message.tail_tokens) != (places.full_pages, places.tail_tokens):
            raise PlaceMismatch(f"sealed {message.full_pages} pages and {message.tail_tokens} tokens")
        if (message.tail is not None) != bool(places.tail_tokens):
            raise PlaceMismatch("the tail page is missing, or there is none")
        choices = [token.choice for token in message.tokens]
        if len(set(choices)) != len(choices) or not set(choices) <= set(range(self.choices)):
            raise HandoffError(f"tokens for choices {choices} of {self.choices}")

    def posted(self, operation: int, now_s: float) -> None:
        if not self.running:
            self.fetching_s = now_s
        self.running.add(operation)

    def returned(self, operation: int, now_s: float) -> None:
        self.running.discard(operation)
        if not self.running:
            self.transfer_s += now_s - self.fetching_s

    def seal(self, message: Sealed, now_s: float) -> None:
        """What has been verified by now was moved while later pages were computed."""
        self.sealed, self.sealed_s, self.hidden_pages = message, now_s, len(self.verified)

    def standing_fetch(self) -> Fetch:
        self.number += 1
        return Fetch(self.key, self.number, self.stream, self.heard.up_to)

    def commit(self, now_s: float, page_bytes: int) -> Committed:
        """What is handed on; the pages are no longer ours. The receipt is the source's, with what is known here."""
        assert self.sealed is not None and self.clear, self.key
        pages, self.pages = tuple(self.pages), []
        moved = self.places.prompt_tokens - self.prefix_pages * self.places.page_size
        exposed_s = now_s - self.sealed_s
        receipt = replace(
            self.sealed.receipt,
            transferred_tokens=moved,
            exposed_transfer_s=exposed_s,
            transferred_bytes=len(self.verified) * page_bytes,
            hidden_bytes=self.hidden_pages * page_bytes,
            transfer_s=self.transfer_s,
        )
        return Committed(self.key, pages, self.sealed.tokens, receipt, exposed_s)

    def overdue(self, now_s: float, deadlines: Deadlines) -> BatonError | None:
        """The error that it ends with, when its time is over."""
        limit_s = deadlines.of(self.state)
        if now_s <= self.until_s and (limit_s is None or now_s - self.moved_s <= limit_s):
            return None
        return DeadlineExceeded(f"no progress of {self.key} while {self.state.value}")
