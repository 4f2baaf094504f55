"""What happens to an end of the protocol, and what it asks for in return: events and effects, as plain values.

An end is pure: `handle(event, now_s)` changes its state and the books of its page pool, and returns what is to be done
outside. The link around it does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import BatonError, HandoffError
from core.messages import Peer, Receipt, Token, WorkerId
from kvtransfer.messages import Grant, HandoffKey, Message, PageEntry, ToReceiver, ToSource
from kvtransfer.places import FilledPage, Places
from kvtransfer.states import State
from kvtransfer.transport import Arrival, Piece

# --- events of both ends -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionUp:
    """The session with a peer is there, for the first time or again."""

    peer: WorkerId


@dataclass(frozen=True, slots=True)
class SessionDown:
    """It broke, and may be resumed."""

    peer: WorkerId


@dataclass(frozen=True, slots=True)
class PeerGone:
    """It will never come back: refused us, or another incarnation has its place."""

    peer: WorkerId
    error: BatonError


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The transport has cut the peer off: nothing of it can land any more."""

    peer: WorkerId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


# --- events of the source ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meet:
    """A hand-off to this peer will be offered: dial it now, so that it hears of us, and of our end."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Offer:
    key: HandoffKey
    peer: Peer
    prompt_tokens: int
    choices: int
    deadline_s: float  # a duration
    ticket: bytes = b""  # the router's permission, for the receiver to see


@dataclass(frozen=True, slots=True)
class Filled:
    """The engine has written these pages."""

    key: HandoffKey
    pages: tuple[FilledPage, ...]


@dataclass(frozen=True, slots=True)
class Seal:
    """The prompt is computed: `tail` is its partly filled last page."""

    key: HandoffKey
    tail: FilledPage | None
    tokens: tuple[Token, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Digested:
    """What `Digest` asked for."""

    key: HandoffKey
    entries: tuple[PageEntry, ...]
    seal: Seal | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """We end this hand-off: cancelled, or the engine failed."""

    key: HandoffKey
    error: BatonError


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The pause after Busy is over."""

    key: HandoffKey
    number: int


@dataclass(frozen=True, slots=True)
class DrainDone:
    """Nothing that was under way when it was asked for goes on."""

    drain: Drain


@dataclass(frozen=True, slots=True)
class FromReceiver:
    peer: WorkerId
    message: ToSource


SourceEvent = (
    Meet | Offer | Filled | Seal | Digested | GiveUp | AskAgain | DrainDone | FromReceiver
    | SessionUp | SessionDown | PeerGone | Forgotten | Tick
)  # fmt: skip

# --- events of the receiver ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expect:
    """A request has been submitted here, and its prompt will come from `peer`."""

    key: HandoffKey
    peer: WorkerId
    places: Places
    deadline_s: float  # a duration
    loan: bool = False  # for the cache alone: less of it is welcome too, and what finds no room is refused at once
    ticket: bytes = b""  # the router's permission: the source must show the same


@dataclass(frozen=True, slots=True)
class Cancel:
    key: HandoffKey
    error: BatonError


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """An operation has returned (`arrivals`) or raised (`error`); `settled`: it cannot write any more."""

    operation: int
    arrivals: tuple[Arrival, ...]
    error: HandoffError | None
    settled: bool


@dataclass(frozen=True, slots=True)
class FromSource:
    peer: WorkerId
    message: ToReceiver


ReceiverEvent = (
    Expect | Cancel | FetchEnded | FromSource | SessionUp | SessionDown | PeerGone | Forgotten | Tick
)

# --- effects -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    peer: WorkerId
    message: Message


@dataclass(frozen=True, slots=True)
class Dial:
    peer: Peer


@dataclass(frozen=True, slots=True)
class HangUp:
    """The peer is lost: end its session for good."""

    peer: WorkerId


@dataclass(frozen=True, slots=True)
class Forget:
    """Cut the peer off at the transport, then say Forgotten."""

    peer: WorkerId


@dataclass(frozen=True, slots=True)
class Digest:
    """Compute the digests of these pages, in the order of asking, then say Digested."""

    key: HandoffKey
    entries: tuple[PageEntry, ...]
    seal: Seal | None


@dataclass(frozen=True, slots=True)
class Drain:
    """Stop what the transport still sends under this stream, then say DrainDone."""

    key: HandoffKey
    peer: WorkerId
    stream: int
    number: int  # tells one from another of the same hand-off


@dataclass(frozen=True, slots=True)
class Later:
    """Say this event after a pause."""

    pause_s: float
    event: AskAgain


@dataclass(frozen=True, slots=True)
class Granted:
    grant: Grant


@dataclass(frozen=True, slots=True)
class Closed:
    """The hand-off has ended at the source."""

    key: HandoffKey
    outcome: State
    error: BatonError | None


@dataclass(frozen=True, slots=True)
class StartFetch:
    operation: int  # never used twice
    peer: WorkerId
    stream: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class CancelFetch:
    operation: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Verified, whole: the pages (by position) are the request's now."""

    key: HandoffKey
    pages: tuple[int, ...]
    tokens: tuple[Token, ...]
    receipt: Receipt
    exposed_transfer_s: float


@dataclass(frozen=True, slots=True)
class Aborted:
    """Nothing is left of it but verified pages in the prefix cache."""

    key: HandoffKey
    error: BatonError
    blames: WorkerId | None


SourceEffect = Send | Dial | HangUp | Forget | Digest | Drain | Later | Granted | Closed
ReceiverEffect = Send | HangUp | Forget | StartFetch | CancelFetch | Committed | Aborted
