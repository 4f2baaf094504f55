"""What the two workers of a pair say to each other, as plain values: the messages of one hand-off.

    source (prefill) -> receiver (decode)    Open  Next  Ready  Sealed  Failed  Renew  Drained
    receiver -> source                       Open  Grant  Busy  Fetch  Refused  Renew  Close

A session belongs to one pair of incarnations, fixed by `Open`; so a message names its hand-off (request, attempt) and
its number, and what cannot be true of that pair cannot be said. Numbers count the sender's messages of one hand-off
from 1, and a message that is sent again keeps its number: hearing a message twice is hearing it once.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import Receipt, Token, WorkerId
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.states import State

HISTORY = "/history"


@dataclass(frozen=True, slots=True, order=True)
class HandoffKey:
    """One attempt of one request: the name of a hand-off."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"

    @property
    def history(self) -> HandoffKey:
        """The loan of pages that precedes this hand-off. No request has such a name: routers draw theirs."""
        return HandoffKey(self.request_id + HISTORY, self.attempt)

    @property
    def of_attempt(self) -> tuple[str, int]:
        """The attempt that it is for, whether it is its hand-off or the loan before that."""
        return self.request_id.removesuffix(HISTORY), self.attempt


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A filled page of the source: its place in the prompt, what it holds, where it lies, what its bytes add up to."""

    position: int  # page index in the prompt
    block_hash: bytes  # the chain value at its end; of the partly filled tail: places.tail_hash
    page: int  # frame of the source's pool
    epoch: int  # with `page`: names the content
    digests: bytes = b""  # one per KV head, one after the other; empty until computed


@dataclass(frozen=True, slots=True)
class Open:
    """The first message each way. `receiver` is whom the source means: another incarnation must not answer."""

    source: WorkerId
    receiver: WorkerId
    fingerprint: Fingerprint
    descriptor: bytes = b""  # what the sender's transport has for the other's


@dataclass(frozen=True, slots=True)
class Next:
    """The request's turn has come at the source, which asks for pages for the whole prompt."""

    key: HandoffKey
    number: int
    prompt_tokens: int
    choices: int
    ticket: bytes = b""  # the router's permission, as the receiver's own request had it


@dataclass(frozen=True, slots=True)
class Grant:
    """Pages are reserved for the whole prompt; the first `prefix_pages` hold their content already."""

    key: HandoffKey
    number: int  # of the Next that it answers
    prefix_pages: int


@dataclass(frozen=True, slots=True)
class Busy:
    """No room now; nothing is held. Ask again after `retry_after_s`."""

    key: HandoffKey
    number: int  # of the Next that it answers
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Fetch:
    """The receiver stands ready for every page from here on; it has all messages up to number `acked`."""

    key: HandoffKey
    number: int
    stream: int  # names the receiver's operations for this hand-off at the transport; never used twice
    acked: int


@dataclass(frozen=True, slots=True)
class Ready:
    """These pages have been written and may be fetched."""

    key: HandoffKey
    number: int
    pages: tuple[PageEntry, ...]


@dataclass(frozen=True, slots=True)
class Sealed:
    """The prompt is complete: `full_pages` whole ones, then the tail, if the last page is only partly filled."""

    key: HandoffKey
    number: int
    full_pages: int
    tail: PageEntry | None
    tail_tokens: int
    tokens: tuple[Token, ...]  # one per choice: the first one sampled
    receipt: Receipt  # the source's share


@dataclass(frozen=True, slots=True)
class Failed:
    """The source gives the hand-off up. `code` is that of a core.errors class."""

    key: HandoffKey
    number: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The receiver will not have this hand-off from this source, whose fault it is."""

    key: HandoffKey
    number: int
    stream: int  # 0: no operation was ever posted
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Renew:
    """The sender lives and wants what the other end holds for it: every lease and grant of the pair is renewed."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """The receiver's word on the end: COMMITTED, or ABORTED with the reason. Said until `Drained` is heard."""

    key: HandoffKey
    number: int
    stream: int
    outcome: State
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing of the source will write into the receiver's pages for this hand-off any more."""

    key: HandoffKey
    number: int


ToReceiver = Next | Ready | Sealed | Failed | Renew | Drained
ToSource = Grant | Busy | Fetch | Refused | Renew | Close
Message = ToReceiver | ToSource
