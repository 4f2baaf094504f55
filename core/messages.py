"""What router and workers say to each other, as plain values. The wire codes them; simulation passes them as they are.

router -> worker   Submit, Cancel, Lend
worker -> router   TokenBatch, RequestFailed   (the token stream: one message per step, whatever the number of rows)
                   Load, PagesChanged          (the event stream: may be dropped, a gap is seen by its number)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from core.sampling import SamplingParams


class Role(enum.Enum):
    """A state of a worker, not of its deployment."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"  # both in one worker: no hand-off


class FinishReason(enum.Enum):
    STOP = "stop"  # an end id, a stop token id, or (decided by the router) a stop string
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class WorkerId:
    """Name and incarnation: the same name started again is a stranger."""

    name: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name}@{self.incarnation:x}"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when a session opens. Constant for its incarnation."""

    worker: WorkerId
    role: Role
    identity: str  # of the weights, tokenizer and RoPE; equal for all workers of one model
    layout: str  # digest of the page layout
    page_size: int
    pages_total: int
    max_context_tokens: int
    handoff_endpoint: str  # where its peers reach it; empty: it takes no hand-offs


@dataclass(frozen=True, slots=True)
class Peer:
    """The other worker of a pair, as the registry (never the client) knows it."""

    worker: WorkerId
    endpoint: str


@dataclass(frozen=True, slots=True)
class Submit:
    """One attempt of a request, sent to each worker of its pair.

    `peer` is the other worker of the pair; None on an aggregated worker, or when the decode worker prefills the
    prompt itself. `emitted[c]` are the ids of choice c that the client has already been given: sampling goes on after
    them, and their indices are never sent again.
    """

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    deadline_s: float  # time left, a duration: clocks are never compared
    peer: Peer | None = None
    emitted: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()  # choices that have ended and are not decoded again
    salt: bytes = b""  # the tenant's: prefixes are shared only under one salt
    priority: int = 0  # lower goes first
    lender: Peer | None = None  # it has been told to lend the first `lent_tokens` of the prompt
    lent_tokens: int = 0
    ticket: bytes = b""  # the router's permission; the same for both workers of the pair
    loan_ticket: bytes = b""  # the lender's, when there is one


@dataclass(frozen=True, slots=True)
class Lend:
    """To a worker that has these tokens in its prefix cache: hand their pages to the peer, which computes the rest.

    Nothing depends on it: whatever is not lent is computed.
    """

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]  # whole pages of them
    peer: Peer
    deadline_s: float  # a duration: that of the request; the peer gives up long before
    salt: bytes = b""
    ticket: bytes = b""  # the router's permission


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop an attempt, or only these choices of it."""

    request_id: str
    attempt: int
    choices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """Token `index` (from 0) of one choice. `finish` is set on the choice's last token."""

    choice: int
    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where the prompt's tokens came from; the parts add up to the prompt."""

    cached_prefill_tokens: int = 0
    cached_decode_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0  # by preemption or replay, beyond the prompt: not a part of the sum
    transferred_tokens: int = 0  # of those cached or computed at prefill: not a part of the sum
    exposed_transfer_s: float = 0.0  # from the seal to the commit: what compute did not hide
    queue_s: float = 0.0
    transferred_bytes: int = 0  # of the pages that were moved
    hidden_bytes: int = 0  # of those, verified before the seal was heard: moved while later pages were computed
    transfer_s: float = 0.0  # how long bytes of it were under way
    fetched_tokens: int = 0  # that prefill had from another worker's cache

    @property
    def prompt_tokens(self) -> int:
        return self.cached_prefill_tokens + self.cached_decode_tokens + self.fetched_tokens + self.computed_tokens

    @property
    def overlap(self) -> float | None:
        """Share of the bytes that were hidden behind compute. None: nothing was moved."""
        return self.hidden_bytes / self.transferred_bytes if self.transferred_bytes else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one request got from one step."""

    request_id: str
    attempt: int
    tokens: tuple[Token, ...]
    receipt: Receipt | None = None  # with the request's first tokens from this worker


@dataclass(frozen=True, slots=True)
class TokenBatch:
    items: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """This attempt is over at this worker. `code` is that of a core.errors class.

    `blames` names the worker at fault when it is not the sender (a lost peer, a bad digest).
    """

    request_id: str
    attempt: int
    code: str
    message: str
    blames: WorkerId | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is; sent when it changes, at most every few tens of milliseconds."""

    waiting_requests: int = 0
    waiting_tokens: int = 0  # prompt tokens not computed yet
    running_requests: int = 0
    pages: dict[str, int] = field(default_factory=dict)  # state -> count; adds up to the pool
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0  # recent mean
    handoffs: dict[str, int] = field(default_factory=dict)  # state -> count
    draining: bool = False


@dataclass(frozen=True, slots=True)
class PagesChanged:
    """Block hashes that this incarnation's prefix cache gained and lost. `number` counts from 1 without gaps."""

    number: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    snapshot: bool = False  # `stored` is everything: the answer to a gap


@dataclass(frozen=True, slots=True)
class PathReport:
    """How pages come to a worker from one peer, as last proved."""

    peer: WorkerId
    transport: str  # empty: there is no path
    lanes: str  # what the transport runs over, in its own words
    bytes_per_s: float
    latency_s: float
    proved_s: float  # how long ago
    trouble: str  # what is wrong with it; empty: nothing


FromWorker = TokenBatch | RequestFailed | Load | PagesChanged
