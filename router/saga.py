"""The saga of one request: placed on a pair of workers, submitted to both, followed to its end, tried again elsewhere.

    place --> submit (attempt k) --> tokens ... --> done
      ^                                  |
      `--- a worker or the hand-off fails, within the budget: what has been emitted goes along, k + 1

P's tokens are only the first of each choice; D repeats them. Whoever is first is emitted, and each index once.
Once D has spoken, the loss of P means nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from core.clock import Clock
from core.errors import (
    BadTicket,
    BatonError,
    Cancelled,
    DeadlineExceeded,
    HandoffError,
    NoCapacity,
    PeerLost,
    PoisonRequest,
    RequestError,
    WorkerDraining,
    WorkerError,
    WorkerLost,
    leaves,
)
from core.messages import Cancel, Lend, Peer, RequestFailed, Submit, Tokens, WorkerId
from core.security.tickets import Tickets
from router.choose import Loan, Need, Placement, choose
from router.generation import GenerationRequest, Step
from router.permits import Permits
from router.poison import NoPoison, Poison, content_of
from router.progress import Progress
from router.retries import MAX_REPLAYS, POISON_WORKERS, PairHealth, RetryBudget
from router.threshold import Threshold
from router.workers import Inbox, Lost, Message, Workers

log = logging.getLogger(__name__)

LATE_S = 5.0  # from when a request is taken from a worker until the router knows that it had died: a silence, and more


@dataclass(slots=True)
class _Run:
    """Everything about one request that outlives an attempt."""

    request: GenerationRequest
    progress: Progress
    ends_s: float
    content: bytes
    attempt: int = 0
    placement: Placement | None = None
    retries: int = 0
    lost_workers: int = 0
    excluded: set[WorkerId] = field(default_factory=set)
    local_refused: bool = False
    decode_spoke: bool = False
    blamed: bool = False  # its last failure named the worker that is at fault
    failed_at: WorkerId | None = None  # where the attempt has failed: who is blamed, or who said so
    handed_back: set[WorkerId] = field(default_factory=set)  # by workers that drain
    spoke: set[WorkerId] = field(default_factory=set)  # who has sent tokens of this attempt
    submitted_s: float = 0.0
    taken_from: dict[WorkerId, float] = field(default_factory=dict)  # when, of those that were not at fault then


class Counters(Protocol):
    """What the saga counts: router.metrics.RouterMetrics."""

    def retried(self, reason: str) -> None:
        """An attempt has failed, with this error's code, and another follows."""
        ...

    def replayed(self) -> None:
        """The new attempt goes on after tokens that the client has."""
        ...

    def placed(self, local: bool) -> None:
        """An attempt was submitted."""
        ...


class NoCounters:
    """Counts nothing."""

    def retried(self, reason: str) -> None: ...

    def replayed(self) -> None: ...

    def placed(self, local: bool) -> None: ...


class Saga:
    """The Generator over real (or simulated) workers."""

    def __init__(
        self,
        workers: Workers,
        clock: Clock,
        threshold: Threshold,
        *,
        placement_wait_s: float = 15.0,
        counters: Counters | None = None,
        tickets: Tickets | None = None,
        poison: Poison | None = None,
    ) -> None:
        """`tickets` None: workers are asked without any, and only those without keys agree."""
        self._permits = Permits(tickets)
        self._workers = workers
        self._clock = clock
        self._threshold = threshold
        self._placement_wait_s = placement_wait_s
        self._counters = counters or NoCounters()
        self._poison = poison or NoPoison()
        self._budget = RetryBudget()
        self._pairs = PairHealth()
        self._runs: dict[str, _Run] = {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Step]:
        """See router.generation.Generator."""
        progress = Progress(request.params.n, request.params.max_tokens)
        run = _Run(request, progress, self._clock() + request.deadline_s, content_of(request))
        self._runs[request.request_id] = run
        self._budget.offered()
        try:
            while not progress.is_done:
                try:
                    run.placement = await self._place(run)
                    async with aclosing(self._attempt(run, run.placement)) as steps:
                        async for step in steps:
                            yield step
                except BatonError as error:
                    self._judge(run, error)
            if self._poison.count(run.content):
                self._poison.answered(run.content)
        finally:
            del self._runs[request.request_id]
            self._workers.close(request.request_id)
            self._cancel(run)

    def finish_choice(self, request_id: str, choice: int) -> None:
        """See router.generation.Generator."""
        run = self._runs.get(request_id)
        if run is not None and run.placement is not None:
            run.progress.finish(choice)
            self._workers.cancel(run.placement.decode, Cancel(request_id, run.attempt, (choice,)))

    def _refuse_poison(self, run: _Run) -> None:
        """Raises PoisonRequest for what has cost two workers, whichever router sent it to them."""
        if self._poison.count(run.content) >= POISON_WORKERS:
            raise PoisonRequest("this request has cost two workers lately and is not tried again")

    # --- one attempt -------------------------------------------------------------------------------------------

    async def _place(self, run: _Run) -> Placement:
        """Wait for workers that can take it. Raises NoCapacity, DeadlineExceeded or PoisonRequest."""
        give_up_s = min(run.ends_s, self._clock() + self._placement_wait_s)
        while True:
            self._refuse_poison(run)
            placement = self._choose(run)
            if placement is not None:
                return placement
            left_s = give_up_s - self._clock()
            if left_s <= 0:
                raise NoCapacity("no worker can take the request now", retry_after_s=self._placement_wait_s)
            try:
                async with asyncio.timeout(left_s):
                    await self._workers.changed()
            except TimeoutError:
                continue

    def _choose(self, run: _Run) -> Placement | None:
        request = run.request
        need = Need(
            len(request.prompt_ids),
            request.params.max_tokens,
            frozenset(run.excluded),
            self._pairs.shunned(self._clock()),
            run.local_refused,
        )
        candidates = self._workers.candidates(request.prompt_ids, request.salt)
        terms = self._threshold.terms()
        # Whoever has failed it is better than nobody: a lone pair is tried again within the retry budget.
        anybody = replace(need, excluded=frozenset(), shunned=frozenset())
        return choose(candidates, need, terms) or choose(candidates, anybody, terms)

    async def _attempt(self, run: _Run, placement: Placement) -> AsyncGenerator[Step, None]:
        """Submit to the pair and follow its tokens. Raises what made it fail."""
        run.attempt += 1
        run.decode_spoke = run.blamed = False
        run.spoke.clear()
        run.submitted_s = self._clock()
        pair = (placement.decode,) if placement.prefill is None else (placement.decode, placement.prefill)
        run.taken_from = {worker: at_s for worker, at_s in run.taken_from.items() if worker not in pair}
        inbox = self._workers.open(run.request.request_id, run.attempt, pair, run.progress.next_index, run.taken_from)
        self._submit(run, placement)
        while not run.progress.is_done:
            worker, message = await self._next(inbox, run.ends_s)
            step = self._take(run, worker, message)
            if step is not None:
                yield step

    async def _next(self, inbox: Inbox, ends_s: float) -> tuple[WorkerId, Message]:
        try:
            async with asyncio.timeout(max(0.0, ends_s - self._clock())):
                return await inbox.messages.get()
        except TimeoutError:
            raise DeadlineExceeded("the request ran past its deadline") from None

    def _submit(self, run: _Run, placement: Placement) -> None:
        """To D first: it must know the prompt when P asks it for pages."""
        self._counters.placed(placement.prefill is None)
        decode = self._workers.peer(placement.decode)
        prefill = None if placement.prefill is None else self._workers.peer(placement.prefill)
        ticket = self._permits.handoff(run.request, run.attempt, prefill, decode, run.ends_s - self._clock())
        if prefill is None:
            self._workers.submit(decode.worker, self._message(run, None, ticket))
            return
        self._pairs.tried((prefill.worker, decode.worker), self._clock())
        to_prefill = self._with_loan(run, placement.loan, prefill, self._message(run, decode, ticket))
        self._workers.submit(decode.worker, self._message(run, prefill, ticket))
        self._workers.submit(prefill.worker, to_prefill)

    def _with_loan(self, run: _Run, loan: Loan | None, borrower: Peer, submit: Submit) -> Submit:
        """Tell the lender, and the borrower when that has been told: without it the prompt is computed."""
        if loan is None:
            return submit
        request, left_s = run.request, run.ends_s - self._clock()
        ids = request.prompt_ids[: loan.tokens]
        lender = self._workers.peer(loan.lender)
        ticket = self._permits.loan(request, run.attempt, lender, borrower, loan.tokens, left_s)
        lend = Lend(request.request_id, run.attempt, ids, borrower, left_s, request.salt, ticket)
        if not self._workers.lend(loan.lender, lend):
            return submit
        return replace(submit, lender=lender, lent_tokens=loan.tokens, loan_ticket=ticket)

    def _message(self, run: _Run, peer: Peer | None, ticket: bytes) -> Submit:
        request = run.request
        assert request.params.seed is not None, "the front sets a seed"
        return Submit(
            request_id=request.request_id,
            attempt=run.attempt,
            prompt_ids=request.prompt_ids,
            params=request.params,
            seed=request.params.seed,
            deadline_s=run.ends_s - self._clock(),
            peer=peer,
            emitted=run.progress.emitted_ids(),
            finished=run.progress.finished,
            salt=request.salt,
            priority=request.priority,
            ticket=ticket,
        )

    def _take(self, run: _Run, worker: WorkerId, message: Message) -> Step | None:
        """A step for the client, or None. Raises when the attempt has failed."""
        assert run.placement is not None
        if worker not in (run.placement.decode, run.placement.prefill):
            self._lost_later(run, worker)
            return None
        if isinstance(message, Lost | RequestFailed):
            if worker == run.placement.prefill and run.decode_spoke:
                return None
            run.blamed = isinstance(message, RequestFailed) and message.blames is not None
            run.failed_at = message.blames or worker if isinstance(message, RequestFailed) else worker
            raise _error_of(message)
        run.spoke.add(worker)
        if worker == run.placement.decode and not run.decode_spoke:
            run.decode_spoke = True
            if run.placement.prefill is not None:
                self._pairs.worked((run.placement.prefill, worker))
            self._observe(run, message)
        tokens = run.progress.accept(message)
        return Step(tokens, message.receipt) if tokens or message.receipt else None

    def _observe(self, run: _Run, first: Tokens) -> None:
        """What the hand-off cost, for the threshold below which there is none."""
        assert run.placement is not None
        if run.placement.prefill is not None and first.receipt is not None:
            rate = self._workers.prefill_rate(run.placement.prefill)
            took_s = self._clock() - run.submitted_s
            self._threshold.observe(took_s, first.receipt.queue_s, first.receipt.computed_tokens, rate)

    # --- after a failure ---------------------------------------------------------------------------------------

    def _judge(self, run: _Run, error: BatonError) -> None:
        """Return to try again; raise what the client is told."""
        too_late = isinstance(error, DeadlineExceeded) and self._clock() >= run.ends_s
        if isinstance(error, RequestError) or too_late or run.placement is None:
            raise error
        if isinstance(error, NoCapacity) and run.placement.prefill is None and not run.local_refused:
            run.local_refused = True  # D's budget for local prefill is taken: a prefill worker's turn
            return self._again(run)
        if isinstance(error, WorkerDraining) and run.failed_at is not None and run.failed_at not in run.handed_back:
            return self._go_on(run, run.failed_at)
        # A worker that gave up, or heard of its peer's giving up, says Cancelled: our own cancels have no answer.
        if not isinstance(error, WorkerError | HandoffError | NoCapacity | DeadlineExceeded | Cancelled):
            raise error
        self._blame(run, error)
        self._refuse_killer(run)
        if run.retries >= MAX_REPLAYS or not self._budget.take():
            if isinstance(error, BadTicket):
                raise error  # keys that differ: coming back soon would not help the client
            raise NoCapacity(f"tried {run.attempt} times, the last one failed with {error.code}", retry_after_s=1.0)
        run.retries += 1
        self._counters.retried(error.code)
        if run.progress.has_emitted:
            self._counters.replayed()
        log.warning("request %s attempt %d failed (%s): again", run.request.request_id, run.attempt, error.message)
        self._again(run)

    def _go_on(self, run: _Run, leaver: WorkerId) -> None:
        """A worker that leaves has handed it back: it goes on elsewhere, and nothing has failed. Once per worker."""
        run.handed_back.add(leaver)
        run.excluded.add(leaver)
        if run.progress.has_emitted:
            self._counters.replayed()
        self._again(run)

    def _again(self, run: _Run) -> None:
        assert run.placement is not None
        for worker in (run.placement.decode, run.placement.prefill):
            if worker is not None and worker not in run.spoke | run.handed_back:
                run.taken_from.setdefault(worker, self._clock())
        self._cancel(run)
        run.placement = None

    def _lost_later(self, run: _Run, worker: WorkerId) -> None:
        """It may have been killed by what was taken from it, before our cancel came. Raises PoisonRequest."""
        if run.spoke or self._clock() - run.taken_from.pop(worker, float("-inf")) > LATE_S:
            return
        run.lost_workers += 1
        self._poison.cost_a_worker(run.content, worker)
        self._refuse_killer(run)

    def _refuse_killer(self, run: _Run) -> None:
        if run.lost_workers >= POISON_WORKERS:
            raise PoisonRequest("this request has cost two workers and is not tried again")

    def _blame(self, run: _Run, error: BatonError) -> None:
        placement = run.placement
        assert placement is not None
        pair = (placement.decode, placement.prefill)
        unreached = [worker for worker in pair if worker is not None and not self._workers.reaches(worker)]
        if isinstance(error, WorkerLost) or (isinstance(error, PeerLost) and unreached):
            run.lost_workers += 1  # its peer may say so before our own session is given up
            run.taken_from |= dict.fromkeys(unreached, float("-inf"))  # counted
            for worker in unreached:
                if worker not in run.spoke:  # whoever had answered was lost with it, not by it
                    self._poison.cost_a_worker(run.content, worker)
        elif isinstance(error, WorkerError):
            run.excluded.add(placement.prefill or placement.decode)
        if (isinstance(error, HandoffError) or run.blamed) and placement.prefill is not None:
            self._pairs.failed((placement.prefill, placement.decode), self._clock())

    def _cancel(self, run: _Run) -> None:
        """Every holder of the attempt lets go. To those that have ended it already this says nothing new."""
        if run.placement is None:
            return
        cancel = Cancel(run.request.request_id, run.attempt)
        placement, loan = run.placement, run.placement.loan
        for worker in dict.fromkeys((placement.decode, placement.prefill, loan.lender if loan else None)):
            if worker is not None:
                self._workers.cancel(worker, cancel)


def _error_of(message: Lost | RequestFailed) -> BatonError:
    if isinstance(message, Lost):
        return WorkerLost(f"worker {message.worker} is gone")
    return leaves().get(message.code, WorkerError)(message.message)
