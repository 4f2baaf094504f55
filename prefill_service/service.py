"""The life of an attempt on the prefill tier: queued, granted, computed chunk by chunk, sealed, closed.

    submit -> queued --its turn; Next--> granted --chunks; Ready--> sealed, token 0 --Close--> pages back to the cache
                 `--a lender was named: its pages are fetched meanwhile (prefill_service.borrower)

    failed or cancelled at any point: the source's end of the hand-off tells the peer

Nothing is computed without a grant, and no page of ours is held while a decode worker is asked for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.clock import Clock
from core.errors import BatonError, Cancelled, DeadlineExceeded, InvalidRequest, NoCapacity, WorkerDraining
from core.messages import Cancel, Peer, Receipt, RequestFailed, Submit, Token, Tokens, WorkerId
from core.telemetry.worker_metrics import WorkerMetrics
from engine import sequence as sequences
from engine.engine import Engine, Sampled, StepReport
from engine.intake import Intake
from kvtransfer.messages import Grant, HandoffKey
from kvtransfer.places import FilledPage, tail_hash
from kvtransfer.states import State
from prefill_service.borrower import Borrower
from session.outlet import Outlet

log = logging.getLogger(__name__)

HELD_UP_S = 0.5  # a grant that is waited for so long: it is the decode worker that has no room

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Source(Protocol):
    """The source end of the hand-off: kvtransfer.source_link.HandoffSource."""

    @property
    def accepts_prefill(self) -> bool: ...

    def meet(self, peer: Peer) -> None: ...

    async def offer(
        self, key: HandoffKey, peer: Peer, prompt_tokens: int, choices: int, deadline_s: float, ticket: bytes = b""
    ) -> Grant: ...

    def ready(self, key: HandoffKey, pages: Sequence[FilledPage]) -> None: ...

    def seal(self, key: HandoffKey, tail: FilledPage | None, tokens: Sequence[Token], receipt: Receipt) -> None: ...

    def fail(self, key: HandoffKey, error: BatonError) -> None: ...

    def cancel(self, key: HandoffKey) -> None: ...


@dataclass(slots=True)
class _Job:
    submit: Submit
    peer: Peer
    sequence: sequences.Sequence
    offer: asyncio.Task[None] | None = None  # while a grant is being asked for
    asked_s: float = 0.0  # since when
    granted: bool = False
    sealed: bool = False
    told_pages: int = 0  # full pages that the peer has or has been told of
    fetched_tokens: int = 0  # of the prefix that was found in the cache: what a lender had lent

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.submit.request_id, self.submit.attempt)


class PrefillService:
    """Owned by the event loop's thread, like the engine."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        outlet: Outlet,
        clock: Clock,
        spawn: Spawn,
        metrics: WorkerMetrics,
        *,
        max_queued: int = 1024,
        ahead_tokens: int = 1024,
        grant_wait_s: float = 15.0,
    ) -> None:
        self._engine = engine
        self._intake = intake
        self._outlet = outlet
        self._clock = clock
        self._spawn = spawn
        self._metrics = metrics
        self._max_queued = max_queued
        self._ahead_tokens = ahead_tokens
        self._grant_wait_s = grant_wait_s
        self._jobs: dict[HandoffKey, _Job] = {}

    def attach(self, source: Source, borrower: Borrower) -> None:
        """The hand-off's end, which calls `on_closed` and so is made after this; and who fetches history for us."""
        self._source = source
        self._borrower = borrower

    # --- from the router ---------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Raises InvalidRequest or NoCapacity; otherwise the attempt is queued."""
        self._intake.check(submit)
        if submit.peer is None:
            raise InvalidRequest("a prefill worker needs to be told its decode worker")
        if len(self._jobs) >= self._max_queued:
            raise NoCapacity("the prefill queue is full")
        sequence = self._intake.shared(submit, self._engine.new_id(), single_step=True)
        job = _Job(submit, submit.peer, sequence)
        self._jobs[job.key] = job
        self._metrics.lately.arrived_tokens.add(self._uncached(job))
        self._source.meet(submit.peer)
        self._borrower.ask(submit, sequence)
        self.pump()

    def cancel(self, cancel: Cancel) -> None:
        job = self._jobs.get(HandoffKey(cancel.request_id, cancel.attempt))
        if job is None or cancel.choices:
            return
        reclaims, key = self._metrics.reclaims, (cancel.request_id, cancel.attempt)
        reclaims.cancelled(key)
        self._end(job, Cancelled("cancelled by the router"), tell_router=False)
        reclaims.hold_until(key, lambda: not job.sequence.pages)
        reclaims.let_go(key)

    def hand_back(self, error: WorkerDraining, *, begun: bool) -> int:
        """Give up what has not begun, or everything: routers place it elsewhere. How many attempts these were."""
        jobs = [job for job in self._jobs.values() if begun or not job.granted]
        for job in jobs:
            self._end(job, error)
        return len(jobs)

    # --- the queue ---------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Ask for grants, most urgent first, so far ahead that the engine never waits for one."""
        now_s = self._clock()
        for job in [j for j in self._jobs.values() if j.sequence.deadline_s <= now_s and not j.sealed]:
            self._end(job, DeadlineExceeded("the prefill did not begin or end in time"))
        ahead = self._ahead()
        idle = [j for j in self._jobs.values() if not _is_ahead(j) and not j.sealed]
        queue = [j for j in idle if not self._borrower.waits(j.key)]
        for job in sorted(queue, key=_urgency):
            if not self._source.accepts_prefill or not self._has_room(job):
                break
            if ahead.get(job.peer, 0) < self._ahead_tokens:
                ahead[job.peer] = ahead.get(job.peer, 0) + len(job.sequence.ids)
                job.offer, job.asked_s = self._spawn(self._offer(job)), now_s

    def _ahead(self) -> dict[Peer, int]:
        """Tokens asked for or granted, by decode worker: one that is full holds up nobody else's requests."""
        ahead: dict[Peer, int] = {}
        for job in self._jobs.values():
            if _is_ahead(job):
                ahead[job.peer] = ahead.get(job.peer, 0) + job.sequence.uncomputed
        return ahead

    def _has_room(self, job: _Job) -> bool:
        """Pages for the whole prompt, beside what those ahead of it will take."""
        missing = -(-len(job.sequence.ids) // self._engine.page_size) - self._borrower.pinned_pages(job.key)
        return missing <= self.free_pages

    @property
    def free_pages(self) -> int:
        """Reusable ones that no attempt waits to take."""
        size = self._engine.page_size
        asked = sum(-(-len(j.sequence.ids) // size) for j in self._jobs.values() if j.offer is not None)
        return self._engine.pool.reusable - asked

    async def _offer(self, job: _Job) -> None:
        """Ask the peer for pages; begin when it grants them. A peer that stays full is the router's to replace."""
        ids, left_s = len(job.sequence.ids), job.sequence.deadline_s - self._clock()
        try:
            async with asyncio.timeout(self._grant_wait_s):
                submit = job.submit
                grant = await self._source.offer(job.key, job.peer, ids, submit.params.n, left_s, submit.ticket)
        except TimeoutError:
            job.offer = None
            self._end(job, NoCapacity(f"no pages were granted within {self._grant_wait_s:.0f} s"))
            return
        except BatonError as error:
            job.offer = None
            self._end(job, error, blames=_leaver(job, error))
            return
        job.offer = None
        self._begin(job, grant)

    def _begin(self, job: _Job, grant: Grant) -> None:
        if not self._engine.reserve(job.sequence):
            self._end(job, NoCapacity("the prefill pool filled up while the grant was on its way"))
            return
        job.granted = True
        self._metrics.lately.queue_wait_s.add(self._clock() - job.sequence.arrived_s)
        job.fetched_tokens = self._borrower.take(job.key, job.sequence.cached_tokens)
        job.told_pages = grant.prefix_pages
        self._engine.add(job.sequence)
        self._tell_ready(job)

    # --- from the engine ---------------------------------------------------------------------------------------

    def on_step(self, report: StepReport) -> None:
        self._metrics.reclaims.stepped()
        for sequence in report.advanced:
            job = self._job_of(sequence)
            if job is not None:
                self._tell_ready(job)
        for sequence, error in report.failed:
            job = self._job_of(sequence)
            if job is not None:
                self._end(job, error)
        by_sequence: dict[int, list[Sampled]] = {}
        for item in report.sampled:
            by_sequence.setdefault(item.sequence.sequence_id, []).append(item)
        for items in by_sequence.values():
            job = self._job_of(items[0].sequence)
            if job is not None:
                self._seal(job, items)
        self.pump()

    def _job_of(self, sequence: sequences.Sequence) -> _Job | None:
        return self._jobs.get(HandoffKey(sequence.request_id, sequence.attempt))

    def _tell_ready(self, job: _Job) -> None:
        """Name the pages that have become full since the last time."""
        full = job.sequence.computed // self._engine.page_size
        if full > job.told_pages:
            hashes = job.sequence.full_hashes(self._engine.page_size)
            pages = [FilledPage(p, hashes[p], job.sequence.pages[p]) for p in range(job.told_pages, full)]
            job.told_pages = full
            self._source.ready(job.key, pages)

    def _seal(self, job: _Job, items: list[Sampled]) -> None:
        """The prompt is computed and its next tokens are known: to the router first, then to the peer."""
        self._tell_ready(job)
        job.sealed = True
        self._metrics.lately.first_token_s.add(self._clock() - job.sequence.arrived_s)
        self._metrics.prefix(job.sequence.prompt_tokens, job.sequence.cached_tokens - job.fetched_tokens)
        sequence = job.sequence
        tokens = tuple(_token(item, sequence.output_tokens) for item in items)
        receipt = self._receipt(job)
        last = all(token.finish is not None for token in tokens)  # the router waits for nobody's word after these
        said = Tokens(sequence.request_id, sequence.attempt, tokens, receipt if last else None)
        self._outlet.send([said])
        self._outlet.end((sequence.request_id, sequence.attempt))
        self._source.seal(job.key, self._tail(sequence), tokens, receipt)

    def _tail(self, sequence: sequences.Sequence) -> FilledPage | None:
        """The partly filled last page, zeroed past its end: what else lay there is nobody's business."""
        size = self._engine.page_size
        full, used = divmod(len(sequence.ids), size)
        if not used:
            return None
        self._engine.zero_tail(sequence.pages[full], used)
        name = tail_hash(sequence.full_hashes(size)[:full], sequence.ids[full * size :])
        return FilledPage(full, name, sequence.pages[full])

    def _receipt(self, job: _Job) -> Receipt:
        sequence = job.sequence
        queue_s = (sequence.first_admitted_s or sequence.arrived_s) - sequence.arrived_s
        computed = sequence.prompt_tokens - sequence.cached_tokens
        return Receipt(
            cached_prefill_tokens=sequence.cached_tokens - job.fetched_tokens,
            fetched_tokens=job.fetched_tokens,
            computed_tokens=computed,
            queue_s=queue_s,
        )

    # --- from the hand-off -------------------------------------------------------------------------------------

    def on_closed(self, key: HandoffKey, outcome: State, error: BatonError | None) -> None:
        """The peer has taken the pages, or the hand-off has failed: ours go back to the cache."""
        job = self._jobs.pop(key, None)
        if job is None:
            return
        self._borrower.drop(key)
        if job.offer is not None:
            job.offer.cancel()
        if job.sequence.status is not sequences.Status.WAITING:
            self._engine.remove(job.sequence)
        if outcome is not State.COMMITTED:
            why = error or Cancelled("the decode worker closed the hand-off")
            self._report_failure(job, why, _leaver(job, why))
        self.pump()

    def _end(self, job: _Job, error: BatonError, *, tell_router: bool = True, blames: WorkerId | None = None) -> None:
        """This attempt is over here: the peer is told, the router if it does not know."""
        self._jobs.pop(job.key, None)
        self._borrower.drop(job.key)
        if job.offer is not None:
            job.offer.cancel()
        if isinstance(error, Cancelled):
            self._source.cancel(job.key)
        else:
            self._source.fail(job.key, error)
        if job.sequence.status is not sequences.Status.WAITING:
            self._engine.remove(job.sequence)
        if tell_router:
            self._report_failure(job, error, blames)

    def _report_failure(self, job: _Job, error: BatonError, blames: WorkerId | None) -> None:
        key = (job.submit.request_id, job.submit.attempt)
        self._outlet.send([RequestFailed(*key, error.code, error.message, blames)])
        self._outlet.end(key)

    # --- figures -----------------------------------------------------------------------------------------------

    @property
    def waiting_requests(self) -> int:
        return sum(not job.granted for job in self._jobs.values())

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that have not been computed yet, queued ones included."""
        return sum(len(job.sequence.ids) - job.sequence.computed for job in self._jobs.values() if not job.sealed)

    def backlog(self) -> tuple[int, list[float]]:
        """Tokens that this worker could compute and has not, and how long each attempt has waited to begin.

        What a decode worker holds up, which has no room, is none of it: more prefill workers would not help.
        """
        now_s = self._clock()
        full = {j.peer for j in self._jobs.values() if j.offer is not None and now_s - j.asked_s > HELD_UP_S}
        ours = [j for j in self._jobs.values() if not j.sealed and (j.granted or j.peer not in full)]
        tokens = sum(j.sequence.uncomputed for j in ours)
        return tokens, [now_s - j.sequence.arrived_s for j in ours if not j.granted]

    def _uncached(self, job: _Job) -> int:
        """Tokens of a prompt that has come that will be computed here, as far as can be told."""
        size, ids = self._engine.page_size, job.sequence.ids
        cached = len(self._engine.pool.lookup(job.sequence.full_hashes(size))) * size
        return len(ids) - min(len(ids) - 1, max(cached, job.submit.lent_tokens))


def _is_ahead(job: _Job) -> bool:
    """Asked for or granted, and not computed to the end."""
    return job.offer is not None or (job.granted and not job.sealed)


def _leaver(job: _Job, error: BatonError) -> WorkerId | None:
    """The peer, when it was the peer that has handed the attempt back."""
    return job.peer.worker if isinstance(error, WorkerDraining) else None


def _urgency(job: _Job) -> tuple[int, float, float]:
    return job.sequence.priority, job.sequence.deadline_s, job.sequence.arrived_s


def _token(item: Sampled, index: int) -> Token:
    return Token(item.choice, index, item.token.token_id, item.token.logprob, item.token.top, item.finish)
