"""Which workers serve a request: a pure function of what the router knows of them.

The cost of a pair, in seconds until the first token, with what it does to the others:

    queue wait at P + uncached tokens / prefill rate + tokens to move / pair bandwidth + effect on D's batch

P and D are chosen jointly, because a prefix at either end changes what the other has to do. What P lacks and a decode
worker has, often D itself, P may fetch instead of computing it: the pair costs the cheaper of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.messages import Load, Role, WorkerId, WorkerInfo

WORTH = 0.5  # of the time that computing would take: P waits no longer than that for a loan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker, as this router sees it at this moment, with this request in mind."""

    info: WorkerInfo
    load: Load
    cached_tokens: int  # of this prompt, in its prefix cache
    unreported_tokens: int = 0  # prompt tokens that we have sent it since its last load report
    unreported_requests: int = 0

    @property
    def worker(self) -> WorkerId:
        return self.info.worker


@dataclass(frozen=True, slots=True)
class Need:
    prompt_tokens: int
    max_tokens: int
    excluded: frozenset[WorkerId] = frozenset()  # they have failed this request
    shunned: frozenset[tuple[WorkerId, WorkerId]] = frozenset()  # (P, D) pairs that fail each other
    local_refused: bool = False  # D's budget for local prefill was taken


@dataclass(frozen=True, slots=True)
class Terms:
    """The numbers of the cost, measured or configured."""

    local_prefill_tokens: int = 128  # fewer uncached tokens than this are prefilled on D; see router.threshold
    prefill_tokens_per_s: float = 1000.0  # until a worker has reported its own
    transfer_tokens_per_s: float = 50_000.0
    lend_tokens: int | None = 128  # fewer than this are not worth a loan; None: nothing is lent
    loan_s: float = 0.01  # what a loan costs beside its bytes: it is asked for, granted, sealed
    batch_row_s: float = 0.002  # what one more sequence does to the others of its batch


@dataclass(frozen=True, slots=True)
class Loan:
    """What P fetches from another worker's cache before it computes the rest."""

    lender: WorkerId
    tokens: int  # the first ones of the prompt, whole pages of them


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: the decode worker prefills the prompt itself (short, cached, or aggregated)."""

    decode: WorkerId
    prefill: WorkerId | None = None
    cost_s: float = 0.0
    loan: Loan | None = None


def choose(candidates: Sequence[Candidate], need: Need, terms: Terms) -> Placement | None:
    """The cheapest placement; None: nobody can take it now, wait for a change."""
    usable = [c for c in candidates if c.worker not in need.excluded and not c.load.draining]
    prefills = [c for c in usable if c.info.role is Role.PREFILL]
    options = [_aggregated(c, need, terms) for c in usable if c.info.role is Role.AGGREGATED]
    for decode in usable:
        if decode.info.role is not Role.DECODE:
            continue
        if not need.local_refused and need.prompt_tokens - decode.cached_tokens < terms.local_prefill_tokens:
            options.append(_local(decode, need, terms))  # by rule: a D that never prefilled has no rate to compare
        else:
            pairs = [p for p in prefills if (p.worker, decode.worker) not in need.shunned]
            options += [_pair(p, decode, need, terms, loan_for(p, decode, usable, need, terms)) for p in pairs]
    return min(options, key=lambda option: (option.cost_s, str(option.decode), str(option.prefill)), default=None)


def loan_for(
    prefill: Candidate, decode: Candidate, workers: Sequence[Candidate], need: Need, terms: Terms
) -> Loan | None:
    """The loan that is quicker than computing, if there is one. Of two equal lenders, the one that decodes."""
    if terms.lend_tokens is None or not prefill.info.handoff_endpoint:
        return None
    lenders = [w for w in workers if w.info.role is Role.DECODE and (prefill.worker, w.worker) not in need.shunned]
    lender = max(lenders, key=lambda w: (w.cached_tokens, w is decode, str(w.worker)), default=None)
    if lender is None:
        return None
    tokens = lender.cached_tokens // prefill.info.page_size * prefill.info.page_size
    gained = tokens - prefill.cached_tokens
    if gained < terms.lend_tokens or _fetching_s(gained, terms) >= WORTH * gained / _rate(prefill, terms):
        return None
    return Loan(lender.worker, tokens)


def _fetching_s(tokens: int, terms: Terms) -> float:
    return terms.loan_s + tokens / terms.transfer_tokens_per_s


def _pair(prefill: Candidate, decode: Candidate, need: Need, terms: Terms, loan: Loan | None) -> Placement:
    fetched = 0 if loan is None else loan.tokens - prefill.cached_tokens
    uncached = need.prompt_tokens - prefill.cached_tokens - fetched
    moved = need.prompt_tokens - decode.cached_tokens
    cost_s = (
        _queue_s(prefill, terms)
        + (_fetching_s(fetched, terms) if fetched else 0.0)
        + uncached / _rate(prefill, terms)
        + moved / terms.transfer_tokens_per_s
        + _batch_s(decode, need, terms)
    )
    return Placement(decode.worker, prefill.worker, cost_s, loan)


def _local(decode: Candidate, need: Need, terms: Terms) -> Placement:
    """On D a prefill also stops the running batch: each of its rows waits for it."""
    prefill_s = (need.prompt_tokens - decode.cached_tokens) / _rate(decode, terms)
    rows = _rows(decode)
    cost_s = _queue_s(decode, terms) + prefill_s * (1 + 0.1 * rows) + _batch_s(decode, need, terms)
    return Placement(decode.worker, None, cost_s)


def _aggregated(worker: Candidate, need: Need, terms: Terms) -> Placement:
    prefill_s = (need.prompt_tokens - worker.cached_tokens) / _rate(worker, terms)
    return Placement(worker.worker, None, _queue_s(worker, terms) + prefill_s + _batch_s(worker, need, terms))


def _queue_s(worker: Candidate, terms: Terms) -> float:
    return (worker.load.waiting_tokens + worker.unreported_tokens) / _rate(worker, terms)


def _rows(worker: Candidate) -> int:
    return worker.load.running_requests + worker.unreported_requests


def _batch_s(worker: Candidate, need: Need, terms: Terms) -> float:
    """One more row slows every row of the batch; a pool with no room makes it wait for somebody to end."""
    free = worker.load.pages.get("free", 0) + worker.load.pages.get("cached", 0)
    pages = -(-(need.prompt_tokens + need.max_tokens) // worker.info.page_size)
    crowded_s = 0.0 if free >= pages or not worker.load.pages else 1.0 + _rows(worker) * worker.load.step_s
    return _rows(worker) * terms.batch_row_s + crowded_s


def _rate(worker: Candidate, terms: Terms) -> float:
    return worker.load.prefill_tokens_per_s or terms.prefill_tokens_per_s
