"""Composes a worker: one engine under one policy or both, the services over it, what sessions see of them.

role         policy                                   services
prefill      PrefillPolicy                            PrefillService, source of hand-offs; Borrower, receiver of loans
decode       DecodePolicy (with a local budget)       DecodeService, receiver of hand-offs; Lender, source of loans
aggregated   DecodePolicy, then PrefillPolicy         DecodeService alone: nothing is handed off
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from core.clock import Clock
from core.errors import BadTicket, EngineError, WorkerDraining
from core.messages import Cancel, Lend, Load, PagesChanged, Role, Submit, WorkerInfo
from core.security.gate import Gate
from core.telemetry.worker_metrics import WorkerMetrics
from decode_service.lender import Lender
from decode_service.policy import DecodePolicy, LocalBudget
from decode_service.service import DecodeService
from engine.engine import Engine, StepReport
from engine.policy import EngineView, Policy, StepPlan
from engine.pool import PagePool
from kvtransfer.messages import HandoffKey
from prefill_service.policy import PrefillPolicy
from prefill_service.service import PrefillService

log = logging.getLogger(__name__)

LOAD_PERIOD_S = 0.05
SWEEP_S = 0.2  # how often `sweep` is called
LOCAL_SHARE = 0.25  # of a decode worker's time, at most, goes to prompts that it prefills beside its batch
DRAINS = "this worker is draining"
RATE_WEIGHT = 0.2  # of the newest step in the running means


@dataclass(frozen=True, slots=True)
class BothPolicies:
    """The aggregated worker's: the running batch first, prompt chunks in what it leaves of the step."""

    decode: DecodePolicy
    prefill: PrefillPolicy

    def plan(self, view: EngineView) -> StepPlan:
        running = self.decode.plan(view)
        if running.preempt:
            return running
        prompts = self.prefill.plan(view)
        return StepPlan(running.rows + prompts.rows, (), running.pause_s)


def policy_for(role: Role, decode: DecodePolicy, prefill: PrefillPolicy) -> Policy:
    """The policy of a role. Raises nothing: every role has one."""
    if role is Role.PREFILL:
        return prefill
    return decode if role is Role.DECODE else BothPolicies(decode, prefill)


class WorkerTier:
    """A session.tier.Tier over the services of one worker."""

    def __init__(self, info: WorkerInfo, engine: Engine, pool: PagePool, metrics: WorkerMetrics, clock: Clock) -> None:
        self._info = info
        self._engine = engine
        self._pool = pool
        self._metrics = metrics
        self._clock = clock
        self.prefill: PrefillService | None = None
        self.decode: DecodeService | None = None
        self.lender: Lender | None = None
        self.local: LocalBudget | None = None  # of the decode policy: follows the measured rate
        self.handoffs: Callable[[], dict[str, int]] = dict
        self.published: Callable[[], None] = _nothing  # called after each step: the feeds take the changes
        self.gate = Gate(None, info)
        self.draining = False
        self._load = Load()
        self._load_s = float("-inf")
        self._swept_s = clock()
        self._changes = 0
        self.prefill_rate = 0.0  # tokens per second of steps that are mostly prompts
        self._step_s = 0.0
        self._preemptions = 0

    # --- session.tier.Tier -------------------------------------------------------------------------------------

    @property
    def info(self) -> WorkerInfo:
        return self._info

    def submit(self, submit: Submit) -> None:
        with self._refusals_counted():
            self.gate.admit(submit, as_source=self.prefill is not None)
        if self.draining:
            raise WorkerDraining(DRAINS)
        if self.prefill is not None:
            self.prefill.submit(submit)
        else:
            assert self.decode is not None
            self.decode.submit(submit)

    def cancel(self, cancel: Cancel) -> None:
        if self.prefill is not None:
            self.prefill.cancel(cancel)
        if self.decode is not None:
            self.decode.cancel(cancel)
        if self.lender is not None and not cancel.choices:
            self.lender.cancel(HandoffKey(cancel.request_id, cancel.attempt))

    def lend(self, lend: Lend) -> None:
        if self.lender is not None:
            with contextlib.suppress(BadTicket), self._refusals_counted():
                self.gate.lend(lend)
                if self.draining:
                    self.lender.refuse(lend, WorkerDraining(DRAINS))
                else:
                    self.lender.lend(lend)

    @contextlib.contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        """Routers that have another key, and whoever else asks: an operator wants to know."""
        try:
            yield
        except BadTicket as error:
            self._metrics.ticket_refused()
            log.warning("refused: %s", error.message)
            raise

    def load(self) -> Load:
        now_s = self._clock()
        if now_s - self._load_s >= LOAD_PERIOD_S:
            self._load, self._load_s = self._measure(), now_s
        return self._load

    def page_changes(self) -> PagesChanged | None:
        stored, removed = self._pool.take_changes()
        if not stored and not removed:
            return None
        self._changes += 1
        return PagesChanged(self._changes, stored, removed)

    def page_snapshot(self) -> PagesChanged:
        return PagesChanged(self._changes, self._pool.known_hashes(), (), snapshot=True)

    async def turn(self) -> float:
        began_s = self._clock()
        try:
            async with asyncio.timeout(10.0):
                await self._engine.turn()
        except TimeoutError:
            raise EngineError("the engine's loop did not come round within 10 s") from None
        return self._clock() - began_s

    # --- its drain ---------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take nothing new from now on; routers hear of it with the next load report."""
        self.draining, self._load_s = True, float("-inf")

    def hand_back(self, *, begun: bool) -> int:
        """Let routers place elsewhere what has not begun here, or everything. How many attempts these were."""
        service = self.prefill or self.decode
        assert service is not None
        return service.hand_back(WorkerDraining("handed back: this worker is draining"), begun=begun)

    # --- from the engine and the clock -------------------------------------------------------------------------

    def on_step(self, report: StepReport) -> None:
        self._metrics.step(report.tokens, report.step_s)
        self._metrics.preempted(self._engine.preemptions - self._preemptions)
        self._preemptions = self._engine.preemptions
        self._step_s += RATE_WEIGHT * (report.step_s - self._step_s)
        if report.tokens >= 64 and report.step_s > 0 and report.tokens > 4 * len(report.sampled):
            rate = report.tokens / report.step_s
            self.prefill_rate += (RATE_WEIGHT if self.prefill_rate else 1.0) * (rate - self.prefill_rate)
            if self.local is not None:
                self.local.tokens_per_s = LOCAL_SHARE * self.prefill_rate
        if self.prefill is not None:
            self.prefill.on_step(report)
        if self.decode is not None:
            self.decode.on_step(report)
        self.published()

    def sweep(self) -> None:
        """Deadlines, and queues whose back-off has passed. Called several times a second."""
        swept_s, self._swept_s = self._swept_s, self._clock()
        self._metrics.loop_lag(max(0.0, self._swept_s - swept_s - SWEEP_S))
        if self.prefill is not None:
            self.prefill.pump()
        if self.decode is not None:
            self.decode.sweep()
        self.published()  # pages that came by a hand-off, while nothing was computed: a retry goes where they are

    def measure(self) -> None:
        """Bring the gauges up to date, for a scrape."""
        load = self._measure()
        self._metrics.requests(load.running_requests, load.waiting_requests)
        self._metrics.pages(load.pages)

    def _measure(self) -> Load:
        sequences = self._engine.sequences
        waiting = sum(not s.is_decoding for s in sequences)
        tokens = sum(s.uncomputed for s in sequences if not s.is_decoding)
        if self.prefill is not None:
            waiting, tokens = self.prefill.waiting_requests, self.prefill.waiting_tokens
        elif self.decode is not None:
            waiting += self.decode.expected_requests
        return Load(
            waiting_requests=waiting,
            waiting_tokens=tokens,
            running_requests=sum(s.is_decoding for s in sequences),
            pages=self._pool.counts(),
            prefill_tokens_per_s=round(self.prefill_rate, 1),
            step_s=round(self._step_s, 4),
            handoffs=self.handoffs(),
            draining=self.draining,
        )


def _nothing() -> None:
    """Nobody listens."""
