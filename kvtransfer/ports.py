"""What the hand-off needs of the rest of the worker: its page pool, its reservations, its sessions, its counters.

`Pages` and `Reservations` are called on the thread that owns the pool's bookkeeping, and return at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from core.messages import Peer, WorkerId
from kvtransfer.messages import HandoffKey, Message
from kvtransfer.states import State

T = TypeVar("T")
Offload = Callable[[Callable[[], T]], Awaitable[T]]  # runs a blocking function off the event loop


class Pages(Protocol):
    """The bookkeeping of a page pool. Owned, leased and quarantined are counts: each call is undone by its twin."""

    def lease(self, page: int) -> None:
        """Keep an owned or leased page for a peer until `unlease`."""
        ...

    def unlease(self, page: int) -> None: ...

    def quarantine(self, page: int) -> None:
        """Some operation may write into the page until `settle`: it is not reusable, whoever releases it."""
        ...

    def settle(self, page: int) -> None: ...

    def epoch(self, page: int) -> int:
        """With the page, names its content."""
        ...

    def release(self, page: int) -> None:
        """Drop one ownership."""
        ...

    def register(self, page: int, block_hash: bytes) -> bool:
        """Full, verified content of an owned page enters the prefix cache under its name."""
        ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages owned for one whole prompt: those that hold their content already, then those to be filled."""

    prefix_pages: tuple[int, ...]
    fresh_pages: tuple[int, ...]


class Reservations(Protocol):
    """What the decode policy grants. Pages that it hands out are owned; the hand-off or its commit releases them."""

    def reserve(self, key: HandoffKey, pages: int) -> Reservation | None:
        """So many pages, all of the prompt of `key`, with room for the growth that the policy projects.

        None: no room now. Of a loan it may be the first pages only.
        """
        ...

    def fresh_page(self, key: HandoffKey) -> int | None:
        """One more owned page, for a fetch that is tried again. None: no room."""
        ...


class Sessions(Protocol):
    """The live connections to peers. Sending never blocks and may lose: a resumed session asks again."""

    def send(self, worker: WorkerId, message: Message) -> None:
        """Lost when there is no session; a session that cannot keep up is ended."""
        ...

    def hang_up(self, worker: WorkerId) -> None:
        """End the session and stop trying to resume it."""
        ...


class Dialer(Sessions, Protocol):
    """The source's sessions: it dials."""

    def dial(self, peer: Peer) -> None:
        """Open a session, and resume it whenever it breaks, until `hang_up`. Does nothing when there is one."""
        ...


class Counters(Protocol):
    """Where the hand-off counts. Called on the event loop; must not block or raise."""

    def met(self, peer: WorkerId) -> None:
        """A hand-off with this peer begins."""
        ...

    def handoff(self, peer: WorkerId, outcome: State, code: str) -> None:
        """One hand-off has ended; `code` is empty when it was committed."""
        ...

    def pages(self, count: int) -> None:
        """So many pages have been handed over, or taken in, and verified."""
        ...

    def moved(self, old: State | None, new: State, lasted_s: float) -> None:
        """One hand-off has gone on, after `lasted_s` in its old state; None: it is new."""
        ...

    def expired(self, state: State) -> None:
        """A deadline has passed in this state; in one that ended it: the other end did not confirm that in time."""
        ...

    def fault(self, peer: WorkerId, code: str) -> None:
        """A fetch from this peer failed, or brought the wrong bytes: counted by pair."""
        ...

    def held_back(self, key: HandoffKey) -> None:
        """It was aborted, and something may still read or write its pages."""
        ...

    def let_go(self, key: HandoffKey) -> None:
        """Nothing does any more: the twin of `held_back`."""
        ...


class NoCounters:
    """Counts nothing."""

    def met(self, peer: WorkerId) -> None: ...

    def handoff(self, peer: WorkerId, outcome: State, code: str) -> None: ...

    def pages(self, count: int) -> None: ...

    def moved(self, old: State | None, new: State, lasted_s: float) -> None: ...

    def expired(self, state: State) -> None: ...

    def fault(self, peer: WorkerId, code: str) -> None: ...

    def held_back(self, key: HandoffKey) -> None: ...

    def let_go(self, key: HandoffKey) -> None: ...
