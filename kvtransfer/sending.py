"""One hand-off as its source knows it: its state, the pages that are leased for it, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import BatonError, DeadlineExceeded, NoCapacity
from core.messages import WorkerId
from kvtransfer.events import Drain, Seal
from kvtransfer.messages import HandoffKey, Next, PageEntry, Ready, Sealed
from kvtransfer.outbox import Outbox
from kvtransfer.places import FilledPage
from kvtransfer.ports import Pages
from kvtransfer.states import ENDED, Deadlines, State


@dataclass(slots=True)
class Sending:
    key: HandoffKey
    peer: WorkerId
    prompt_tokens: int
    choices: int
    page_size: int
    until_s: float  # the request's deadline
    moved_s: float  # last progress
    entered_s: float  # the beginning of its state
    ticket: bytes = b""
    state: State = State.QUEUED
    asked: int = 1  # number of the last Next
    pause_s: float | None = None  # after a Busy; None: an answer to Next is awaited
    prefix_pages: int = 0
    positions: set[int] = field(default_factory=set)
    leased: list[int] = field(default_factory=list)
    outbox: Outbox = field(default_factory=Outbox)
    said_s: float = 0.0
    stream: int = 0
    answered: bool = False  # the receiver has said that it is over, or never will
    draining: Drain | None = None  # the last one asked for
    drained: bool = False  # and it is done
    undecided: str = ""  # the code that it was given up with after its seal, until the receiver has told its end
    held_back: bool = False  # it was aborted, and its pages are leased yet

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def full_pages(self) -> int:
        return self.prompt_tokens // self.page_size

    @property
    def tail_tokens(self) -> int:
        return self.prompt_tokens % self.page_size

    def question(self) -> Next:
        return Next(self.key, self.asked, self.prompt_tokens, self.choices, self.ticket)

    def hold(self, pages: Pages, filled: FilledPage) -> PageEntry:
        """Lease a page that the engine has written. Its epoch is that of now."""
        assert filled.position not in self.positions, (self.key, filled)
        self.positions.add(filled.position)
        self.leased.append(filled.page)
        pages.lease(filled.page)
        return PageEntry(filled.position, filled.block_hash, filled.page, pages.epoch(filled.page))

    def let_go(self, pages: Pages) -> None:
        """Nothing of ours moves under its stream any more."""
        self.drained = True
        while self.leased:
            pages.unlease(self.leased.pop())

    def check_seal(self, seal: Seal) -> None:
        """Every page has been handed to us: a hand-off with a hole is the engine's mistake."""
        assert len(self.positions) == self.full_pages - self.prefix_pages, (self.key, sorted(self.positions))
        assert (seal.tail is None) == (self.tail_tokens == 0), (self.key, seal.tail)
        assert seal.tail is None or seal.tail.position == self.full_pages, (self.key, seal.tail)

    def readies(self, entries: tuple[PageEntry, ...], pages_each: int) -> Iterator[Ready]:
        for start in range(0, len(entries), pages_each):
            yield Ready(self.key, 0, entries[start : start + pages_each])

    def sealed(self, seal: Seal, entries: tuple[PageEntry, ...]) -> Sealed:
        return Sealed(
            key=self.key,
            number=0,
            full_pages=self.full_pages,
            tail=entries[0] if entries else None,
            tail_tokens=self.tail_tokens,
            tokens=seal.tokens,
            receipt=seal.receipt,
        )

    def overdue(self, now_s: float, deadlines: Deadlines) -> BatonError | None:
        """The error that it ends with, when its time is over."""
        limit_s = deadlines.of(self.state)
        if now_s <= self.until_s and (limit_s is None or now_s - self.moved_s <= limit_s):
            return None
        if self.state is State.QUEUED and self.pause_s is not None:
            return NoCapacity(f"{self.peer} had no room in time")
        return DeadlineExceeded(f"no progress of {self.key} while {self.state.value}")
