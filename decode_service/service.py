"""The life of an attempt on the decode tier: expected, handed off (or prefilled here), decoded, over.

    submit --peer----> expected --Next--> pages reserved --Close(COMMITTED)--> running --last token--> over
       |                                                                          ^
       `----no peer--> prefilled here, within the policy's budget ----------------'

A newer attempt of a request takes the place of an older one; the pages that the older one had verified are prefix hits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from core.clock import Clock
from core.errors import BatonError, DeadlineExceeded, InvalidRequest, NoCapacity, WorkerDraining
from core.messages import Cancel, Peer, Receipt, RequestFailed, Submit, Token, Tokens, WorkerId
from core.telemetry.worker_metrics import WorkerMetrics
from decode_service.receipts import prefilled_here, taken_in
from engine.engine import Engine, Sampled, StepReport
from engine.intake import Intake
from engine.sequence import Sequence
from kvtransfer.messages import HandoffKey
from kvtransfer.ports import Reservation
from session.outlet import Outlet

log = logging.getLogger(__name__)


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
        ticket: bytes = b"",
    ) -> None: ...

    def cancel(self, key: HandoffKey, error: BatonError | None = None) -> None: ...


@dataclass(slots=True)
class _Job:
    submit: Submit
    shared: Sequence  # over the ids that all choices share; the first choice's own once they have parted
    since_s: float
    sequences: dict[int, Sequence] = field(default_factory=dict)  # choice -> what decodes it
    expected: bool = False  # the hand-off is not committed yet
    reserved: bool = False  # and its pages are set aside
    receipt: Receipt | None = None  # due with the next tokens
    spoke_s: dict[int, float] = field(default_factory=dict)  # choice -> when its last token left

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.submit.request_id, self.submit.attempt)


class DecodeService:
    """Owned by the event loop's thread, like the engine."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        outlet: Outlet,
        clock: Clock,
        metrics: WorkerMetrics,
        *,
        max_requests: int = 1024,
        growth_tokens: int = 256,
        max_local_tokens: int | None = None,
    ) -> None:
        self._engine = engine
        self._intake = intake
        self._receiver: Receiver | None = None
        self._outlet = outlet
        self._clock = clock
        self._metrics = metrics
        self._max_requests = max_requests
        self._growth_tokens = growth_tokens
        self._max_local_tokens = max_local_tokens  # waiting for local prefill at once; None: no bound
        self._jobs: dict[HandoffKey, _Job] = {}

    def attach(self, receiver: Receiver) -> None:
        """The hand-off's end, which calls back and so is made after this. An aggregated worker has none."""
        self._receiver = receiver

    # --- from the router ---------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Raises InvalidRequest or NoCapacity; otherwise the attempt is expected, or prefilled here."""
        self._intake.check(submit)
        self._supersede(submit)
        if len(self._jobs) >= self._max_requests:
            raise NoCapacity("the decode worker holds as many requests as it may")
        shared = self._intake.shared(submit, self._engine.new_id(), single_step=False)
        if not shared.choices:
            raise InvalidRequest("every choice has finished")
        job = _Job(submit, shared, self._clock())
        if submit.peer is None:
            self._prefill_here(job)
        elif self._receiver is None:
            raise InvalidRequest("an aggregated worker takes no hand-off")
        else:
            job.expected = True
            hashes = shared.full_hashes(self._engine.page_size)
            deadline_s, ticket = submit.deadline_s, submit.ticket
            self._receiver.expect(job.key, shared.ids, hashes, submit.peer, deadline_s, ticket=ticket)
        self._jobs[job.key] = job

    def cancel(self, cancel: Cancel) -> None:
        job = self._jobs.get(HandoffKey(cancel.request_id, cancel.attempt))
        if job is None:
            return
        for choice in cancel.choices:
            self._end_choice(job, choice)
        if not cancel.choices:
            self._metrics.reclaims.cancelled(_ids(job))
            self._drop(job)
            for sequence in job.sequences.values():
                self._metrics.reclaims.hold_until(_ids(job), partial(_is_back, sequence))
            self._metrics.reclaims.let_go(_ids(job))

    def hand_back(self, error: WorkerDraining, *, begun: bool) -> int:
        """Give up what has not begun, or everything: routers go on with it elsewhere. How many attempts these were."""
        jobs = [job for job in self._jobs.values() if begun or not _has_begun(job)]
        for job in jobs:
            self._fail(job, error)
        return len(jobs)

    def _supersede(self, submit: Submit) -> None:
        """Raises InvalidRequest for an attempt that is older than one we have."""
        for job in [j for j in self._jobs.values() if j.submit.request_id == submit.request_id]:
            if job.submit.attempt >= submit.attempt:
                raise InvalidRequest("a newer attempt of this request is here")
            self._drop(job)
            self._outlet.end((job.submit.request_id, job.submit.attempt))

    def _prefill_here(self, job: _Job) -> None:
        """Raises NoCapacity when the budget for local prefill is taken: the router then asks a prefill worker."""
        waiting = sum(s.uncomputed for s in self._engine.sequences if not s.is_decoding)
        if self._max_local_tokens is not None and waiting + len(job.shared.ids) > self._max_local_tokens and waiting:
            raise NoCapacity("the budget for local prefill is taken")
        self._metrics.local_prefill()
        self._metrics.lately.arrived_tokens.add(self._uncached(job.shared))
        if self._intake.parted(job.submit):
            for choice in job.shared.choices:
                self._run(job, self._intake.separate(job.submit, self._engine.new_id(), choice))
        else:
            for choice in job.shared.choices:
                job.sequences[choice] = job.shared
            self._engine.add(job.shared)

    def _run(self, job: _Job, sequence: Sequence) -> None:
        job.sequences[sequence.choices[0]] = sequence
        self._engine.add(sequence)

    # --- from the hand-off -------------------------------------------------------------------------------------

    def reserve(self, key: HandoffKey, pages: int) -> Reservation | None:
        """Pages for the prompt, if the projected growth of all that run fits beside them. None: Busy."""
        job = self._jobs.get(key)
        if job is None or not job.expected:
            return None
        size, pool = self._engine.page_size, self._engine.pool
        growth = self.growth_pages + self._growth_of(job.shared) * len(job.shared.choices)
        if pages + growth > pool.reusable and self._engine.sequences:
            self._metrics.lately.refused_grants.add(1.0)
            return None
        full = len(job.shared.ids) // size
        prefix = pool.lookup(job.shared.full_hashes(size)[:full])
        pool.acquire(prefix)
        fresh = pool.allocate(pages - len(prefix))
        if fresh is None:
            pool.release_all(prefix)
            self._metrics.lately.refused_grants.add(1.0)
            return None
        job.shared.cached_tokens = len(prefix) * size
        job.reserved = True
        return Reservation(tuple(prefix), tuple(fresh))

    def fresh_page(self, key: HandoffKey) -> int | None:
        """Another page in place of one that took in bad bytes."""
        pages = self._engine.pool.allocate(1)
        return pages[0] if pages else None

    def on_commit(
        self,
        key: HandoffKey,
        pages: tuple[int, ...],
        tokens: tuple[Token, ...],
        receipt: Receipt,
        exposed_transfer_s: float,
    ) -> None:
        """The pages are verified and ours: every unfinished choice joins the running batch."""
        job = self._jobs.get(key)
        if job is None or not job.expected:
            self._engine.pool.release_all(pages)
            return
        job.expected = False
        self._metrics.prefix(job.shared.prompt_tokens, min(job.shared.cached_tokens, job.shared.prompt_tokens))
        job.receipt = taken_in(job.shared, receipt, exposed_transfer_s)
        self._metrics.handoffs.taken(job.receipt)
        shared = job.shared
        self._engine.adopt(shared, list(pages), len(shared.ids))
        if self._intake.parted(job.submit):
            self._replay(job)
        else:
            self._part(job, tokens)
            self._send(job, tokens)
        if not job.sequences:
            self._over(job)

    def on_abort(self, key: HandoffKey, error: BatonError, blames: WorkerId | None) -> None:
        job = self._jobs.get(key)
        if job is not None:
            self._fail(job, error, blames)

    def _part(self, job: _Job, tokens: tuple[Token, ...]) -> None:
        """Each choice goes on from its own first token; the last of them takes the shared sequence."""
        live = [token for token in tokens if token.finish is None]
        for token in live[:-1]:
            self._continue(job, self._engine.branch(job.shared, token.choice), token)
        if live:
            self._continue(job, job.shared, live[-1])
        else:
            self._engine.remove(job.shared)

    def _continue(self, job: _Job, sequence: Sequence, token: Token) -> None:
        job.spoke_s[token.choice] = self._clock()
        sequence.choices = (token.choice,)
        sequence.ids.append(token.token_id)
        job.sequences[token.choice] = sequence

    def _replay(self, job: _Job) -> None:
        """Several choices that have emitted ids already: they share the prompt's pages and compute their own rest."""
        for choice in job.shared.choices:
            sequence = self._engine.branch(job.shared, choice)
            sequence.ids += job.submit.emitted[choice]
            job.sequences[choice] = sequence
        self._engine.remove(job.shared)

    # --- from the engine ---------------------------------------------------------------------------------------

    def on_step(self, report: StepReport) -> None:
        """One step's tokens go out together; choices that have ended are let go of."""
        self._metrics.reclaims.stepped()
        news: dict[HandoffKey, list[Token]] = {}
        for item in report.sampled:
            key = HandoffKey(item.sequence.request_id, item.sequence.attempt)
            job = self._jobs.get(key)
            if job is not None:
                news.setdefault(key, []).append(self._take(job, item))
        self._outlet.send([self._tokens(self._jobs[key], tuple(tokens)) for key, tokens in news.items()])
        for key in news:
            if not self._jobs[key].sequences:
                self._over(self._jobs[key])
        for sequence, error in report.failed:
            job = self._jobs.get(HandoffKey(sequence.request_id, sequence.attempt))
            if job is not None:
                self._fail(job, error)

    def _take(self, job: _Job, item: Sampled) -> Token:
        """Note who decodes the choice from now on, and how long its token was waited for."""
        now_s = self._clock()
        if item.choice in job.spoke_s:
            self._metrics.lately.token_gap_s.add(now_s - job.spoke_s[item.choice])
        job.spoke_s[item.choice] = now_s
        if item.finish is None:
            job.sequences[item.choice] = item.sequence
        else:
            job.sequences.pop(item.choice, None)
        if job.receipt is None and item.sequence.output_tokens == 1 + len(self._emitted(job, item.choice)):
            job.receipt = self._local_receipt(item.sequence)
        index = item.sequence.output_tokens - 1
        return Token(item.choice, index, item.token.token_id, item.token.logprob, item.token.top, item.finish)

    def _emitted(self, job: _Job, choice: int) -> tuple[int, ...]:
        return job.submit.emitted[choice] if job.submit.emitted else ()

    def sweep(self) -> None:
        """Fail what is past its deadline. Called about once a second."""
        now_s = self._clock()
        for job in [j for j in self._jobs.values() if j.shared.deadline_s <= now_s]:
            self._fail(job, DeadlineExceeded("the request ran past its deadline"))

    # --- ends --------------------------------------------------------------------------------------------------

    def _send(self, job: _Job, tokens: tuple[Token, ...]) -> None:
        self._outlet.send([self._tokens(job, tokens)])

    def _tokens(self, job: _Job, tokens: tuple[Token, ...]) -> Tokens:
        receipt, job.receipt = job.receipt, None
        return Tokens(job.submit.request_id, job.submit.attempt, tokens, receipt)

    def _end_choice(self, job: _Job, choice: int) -> None:
        """The router needs this choice no longer. One that still shares its sequence ends when they part."""
        sequence = job.sequences.get(choice)
        if sequence is None or len(sequence.choices) > 1:
            return
        del job.sequences[choice]
        self._engine.remove(sequence)
        if not job.sequences:
            self._over(job)

    def _over(self, job: _Job) -> None:
        self._jobs.pop(job.key, None)
        self._outlet.end((job.submit.request_id, job.submit.attempt))

    def _drop(self, job: _Job, error: BatonError | None = None) -> None:
        """Let go of everything, without a word but to the source."""
        self._jobs.pop(job.key, None)
        if job.expected and self._receiver is not None:
            self._receiver.cancel(job.key, error)
        for sequence in {s.sequence_id: s for s in job.sequences.values()}.values():
            self._engine.remove(sequence)

    def _fail(self, job: _Job, error: BatonError, blames: WorkerId | None = None) -> None:
        self._drop(job, error if isinstance(error, WorkerDraining) else None)
        self._outlet.send([RequestFailed(*_ids(job), error.code, error.message, blames)])

    # --- figures -----------------------------------------------------------------------------------------------

    def _growth_of(self, sequence: Sequence) -> int:
        """Pages that a sequence is expected to take yet: up to its limit, but no more than the projection."""
        left = sequence.params.max_tokens - sequence.output_tokens
        return -(-min(left, self._growth_tokens) // self._engine.page_size)

    @property
    def promised_pages(self) -> int:
        """Pages that prompts will take which were submitted here, and for which nothing is set aside yet."""
        size, jobs = self._engine.page_size, self._jobs.values()
        coming = [job.shared for job in jobs if job.expected and not job.reserved]
        return sum(-(-len(s.ids) // size) + self._growth_of(s) * len(s.choices) for s in coming)

    @property
    def growth_pages(self) -> int:
        """Pages that all that run, and those that are on their way here, are expected to take yet."""
        coming = [job.shared for job in self._jobs.values() if job.reserved and job.expected]
        running = sum(self._growth_of(sequence) for sequence in self._engine.sequences)
        return running + sum(self._growth_of(shared) * len(shared.choices) for shared in coming)

    def _local_receipt(self, sequence: Sequence) -> Receipt:
        receipt = prefilled_here(sequence)
        self._metrics.prefix(sequence.prompt_tokens, sequence.cached_tokens)
        self._metrics.lately.queue_wait_s.add(receipt.queue_s)
        self._metrics.lately.first_token_s.add(self._clock() - sequence.arrived_s)
        return receipt

    @property
    def is_aggregated(self) -> bool:
        """Every prompt is computed here: there are no hand-offs."""
        return self._receiver is None

    def silences_s(self) -> list[float]:
        """How long each choice that is decoded has been silent."""
        now_s = self._clock()
        return [now_s - job.spoke_s[c] for job in self._jobs.values() for c in job.sequences if c in job.spoke_s]

    def _uncached(self, sequence: Sequence) -> int:
        size = self._engine.page_size
        cached = len(self._engine.pool.lookup(sequence.full_hashes(size))) * size
        return len(sequence.ids) - min(len(sequence.ids) - 1, cached)

    @property
    def expected_requests(self) -> int:
        return sum(job.expected for job in self._jobs.values())

    @property
    def oldest_expected_s(self) -> float:
        """How long the oldest prefill that is owed to us has taken so far."""
        return max((self._clock() - job.since_s for job in self._jobs.values() if job.expected), default=0.0)


def _ids(job: _Job) -> tuple[str, int]:
    return job.submit.request_id, job.submit.attempt


def _has_begun(job: _Job) -> bool:
    """Pages are set aside for it, or were when it was first computed."""
    return job.reserved or any(s.first_admitted_s is not None for s in job.sequences.values())


def _is_back(sequence: Sequence) -> bool:
    """The step that used its pages has ended."""
    return not sequence.pages
