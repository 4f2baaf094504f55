"""What a prefill worker borrows: the history of a conversation, out of the cache of the worker that decoded it.

    ask -> expected --Next--> pages set aside, or refused --Close(COMMITTED)--> pinned --its attempt begins--> cached
              `--refused, failed, given up: what had been verified is in the cache

A loan never fails a request, and costs it a bounded wait: half of the time in which the same tokens could be computed.
Borrowed pages are an ordinary prefix of the cache. They are kept from eviction only for a while, since nobody may wait
for room at one worker while holding pages at another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.clock import Clock
from core.errors import BatonError, Cancelled, HandoffError
from core.messages import Peer, Receipt, Submit, Token, WorkerId
from core.telemetry.worker_metrics import WorkerMetrics
from engine.pool import PagePool
from engine.sequence import Sequence
from kvtransfer.messages import HandoffKey
from kvtransfer.ports import Reservation

log = logging.getLogger(__name__)

PATIENCE = 0.5  # of the time that computing would take
OVERTIME_S = 2.0  # an attempt that is queued leaves its loan so much longer before it is given up
PIN_S = 2.0  # a loan that has come is kept from eviction for so long, unless its attempt begins before
LOANED_SHARE = 2  # at most one in so many pages of the pool is set aside or pinned for loans
AVOIDED = 20  # times as long as was waited in vain for a worker's loan, none is asked of it: 5 % is lost at most
LONGEST_AVOIDED_S = 60.0
UNMEASURED_TOKENS_PER_S = 1000.0

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Receiver(Protocol):
    """The receiving end of the hand-off: kvtransfer.receiver_link.HandoffReceiver."""

    def expect(
        self,
        key: HandoffKey,
        prompt_ids: list[int],
        block_hashes: list[bytes],
        peer: Peer,
        deadline_s: float,
        *,
        loan: bool = False,
        ticket: bytes = b"",
    ) -> None: ...

    def cancel(self, key: HandoffKey, error: BatonError | None = None) -> None: ...


@dataclass(slots=True)
class _Loan:
    lender: Peer
    hashes: list[bytes]  # of the pages that are lent
    own_pages: int  # of them, here before it began
    since_s: float
    until_s: float  # the attempt waits no longer
    waited: bool = True  # neither come nor failed nor given up
    reserved: int = 0  # pages set aside for it
    pinned: tuple[int, ...] = ()
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Borrower:
    """Owned by the event loop's thread. It is the Reservations and the outcomes of its end of the hand-off."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        clock: Clock,
        spawn: Spawn,
        metrics: WorkerMetrics,
        *,
        rate: Callable[[], float],
        free_pages: Callable[[], int],
        settled: Callable[[], None],
    ) -> None:
        """`rate`: prompt tokens computed per second; `free_pages`: not promised to anybody; `settled`: look again."""
        self._pool = pool
        self._page_size = page_size
        self._clock = clock
        self._spawn = spawn
        self._metrics = metrics
        self._rate = rate
        self._free_pages = free_pages
        self._settled = settled
        self._loans: dict[HandoffKey, _Loan] = {}
        self._avoided: dict[WorkerId, float] = {}  # until when; as many as there are workers

    def attach(self, receiver: Receiver) -> None:
        """The hand-off's end, which calls back and so is made after this."""
        self._receiver = receiver

    # --- from the prefill service ------------------------------------------------------------------------------

    def ask(self, submit: Submit, sequence: Sequence) -> None:
        """Expect the pages that a lender has been told to lend, if any."""
        size, key = self._page_size, HandoffKey(submit.request_id, submit.attempt).history
        pages = min(submit.lent_tokens, len(sequence.ids) - 1) // size
        if submit.lender is None or pages <= 0:
            return
        hashes = sequence.full_hashes(size)[:pages]
        own = len(self._pool.lookup(hashes))
        if own >= pages or self._avoids(submit.lender.worker):
            self._receiver.cancel(key)  # the lender hears of it when it asks
            return
        patience_s = PATIENCE * (pages - own) * size / (self._rate() or UNMEASURED_TOKENS_PER_S)
        now_s = self._clock()
        loan = self._loans[key] = _Loan(submit.lender, hashes, own, now_s, now_s + patience_s)
        loan.tasks.append(self._spawn(self._watch(key, patience_s)))
        ids = sequence.ids[: pages * size]
        ticket = submit.loan_ticket
        self._receiver.expect(key, ids, hashes, submit.lender, submit.deadline_s, loan=True, ticket=ticket)

    def waits(self, key: HandoffKey) -> bool:
        """Whether this attempt had better not begin yet."""
        loan = self._loans.get(key.history)
        return loan is not None and loan.waited and self._clock() < loan.until_s

    def pinned_pages(self, key: HandoffKey) -> int:
        """Pages that are kept here for this attempt, and that it need not find room for."""
        loan = self._loans.get(key.history)
        return len(loan.pinned) if loan is not None else 0

    def take(self, key: HandoffKey, cached_tokens: int) -> int:
        """The attempt has begun, and holds what it found in the cache: how much of that was borrowed."""
        loan = self._loans.get(key.history)
        if loan is None:
            return 0
        self.drop(key)
        borrowed_to = min(cached_tokens, loan.reserved * self._page_size)
        fetched = max(0, borrowed_to - loan.own_pages * self._page_size)
        self._metrics.fetched(fetched)
        return fetched

    def drop(self, key: HandoffKey) -> None:
        """The attempt needs it no more: what is under way is given up, what has come may be evicted."""
        loan = self._loans.pop(key.history, None)
        if loan is None:
            return
        for task in loan.tasks:
            task.cancel()
        if loan.waited:
            self._give_up(key.history, loan)
        self._pool.release_all(loan.pinned)

    def _give_up(self, key: HandoffKey, loan: _Loan) -> None:
        """It has not come in time, or is not wanted any more."""
        loan.waited = False
        if self._clock() >= loan.until_s:
            self._avoid(loan)
        self._receiver.cancel(key, Cancelled("nobody waits for the loan any more"))

    # --- from the hand-off -------------------------------------------------------------------------------------

    def reserve(self, key: HandoffKey, pages: int) -> Reservation | None:
        """kvtransfer.ports.Reservations. None: refused, there is no waiting for room."""
        loan = self._loans.get(key)
        if loan is None or not loan.waited:
            return None
        prefix = self._pool.lookup(loan.hashes[:pages])
        wanted = pages - len(prefix)
        held = sum(other.reserved for other in self._loans.values() if other.waited or other.pinned)
        if wanted > self._free_pages() or held + pages > self._pool.capacity // LOANED_SHARE:
            return None
        self._pool.acquire(prefix)
        fresh = self._pool.allocate(wanted)
        if fresh is None:
            self._pool.release_all(prefix)
            return None
        loan.own_pages, loan.reserved = len(prefix), pages
        return Reservation(tuple(prefix), tuple(fresh))

    def fresh_page(self, key: HandoffKey) -> int | None:
        """kvtransfer.ports.Reservations."""
        pages = self._pool.allocate(1) if self._free_pages() > 0 else None
        return pages[0] if pages else None

    def on_commit(
        self,
        key: HandoffKey,
        pages: tuple[int, ...],
        tokens: tuple[Token, ...],
        receipt: Receipt,
        exposed_transfer_s: float,
    ) -> None:
        """The loan has come: verified, and in the cache under its names."""
        loan = self._loans.get(key)
        if loan is None:
            self._pool.release_all(pages)
            return
        loan.waited, loan.pinned = False, pages
        loan.tasks.append(self._spawn(self._unpin(loan)))
        self._settled()

    def on_abort(self, key: HandoffKey, error: BatonError, blames: WorkerId | None) -> None:
        """It will not come, or only the first pages of it have."""
        loan = self._loans.get(key)
        if loan is None or not loan.waited:
            return
        log.info("the loan %s from %s came to nothing: %s", key, loan.lender.worker, error)
        loan.waited = False
        if isinstance(error, HandoffError):
            self._avoid(loan)
        self._settled()

    # --- time --------------------------------------------------------------------------------------------------

    async def _watch(self, key: HandoffKey, patience_s: float) -> None:
        """The attempt may begin without it; what comes until then is used; and nothing is set aside for ever."""
        await asyncio.sleep(patience_s)
        self._settled()
        await asyncio.sleep(OVERTIME_S)
        loan = self._loans.get(key)
        if loan is not None and loan.waited:
            self._give_up(key, loan)

    async def _unpin(self, loan: _Loan) -> None:
        await asyncio.sleep(PIN_S)
        pinned, loan.pinned = loan.pinned, ()
        self._pool.release_all(pinned)

    def _avoid(self, loan: _Loan) -> None:
        now_s = self._clock()
        self._avoided[loan.lender.worker] = now_s + min(AVOIDED * (now_s - loan.since_s), LONGEST_AVOIDED_S)

    def _avoids(self, lender: WorkerId) -> bool:
        now_s = self._clock()
        self._avoided = {worker: until_s for worker, until_s in self._avoided.items() if until_s > now_s}
        return lender in self._avoided
