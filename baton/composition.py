"""Puts the parts of one worker together, over whatever executor, memory, transport and clock it is given.

The worker process gives it torch, shared memory and the machine's clock; the simulation the hash-chain engine, the
adversarial transport and virtual time. Everything between is the same code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

from baton.tier import SWEEP_S, WorkerTier, policy_for
from core.clock import Clock
from core.messages import Role, WorkerId, WorkerInfo
from core.security.gate import Gate
from core.security.tickets import Tickets
from core.telemetry.worker_metrics import WorkerMetrics
from decode_service.lender import Lender
from decode_service.policy import DecodePolicy, LocalBudget
from decode_service.service import DecodeService
from engine.batch import Executor
from engine.engine import Engine, RunBlocking
from engine.intake import Intake
from engine.pool import PagePool
from kvtransfer.chores import Chores
from kvtransfer.digest import Digest, plain
from kvtransfer.fingerprint import Fingerprint
from kvtransfer.frames import Frames
from kvtransfer.liveness import Timing
from kvtransfer.messages import HandoffKey
from kvtransfer.ports import Reservations
from kvtransfer.receiver_link import HandoffReceiver, Outcomes
from kvtransfer.source_link import HandoffSource, OnClosed
from kvtransfer.states import State
from kvtransfer.transport import Transport
from kvtransfer.two_ends import TwoEnds
from prefill_service.borrower import Borrower
from prefill_service.policy import PrefillPolicy
from prefill_service.service import PrefillService
from session.outlet import Outlet


@dataclass(frozen=True, slots=True)
class Model:
    """What the services know of the model."""

    identity: str
    vocabulary: int
    max_context_tokens: int
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """A worker's scheduling, resolved from its options."""

    step_tokens: int = 512
    max_rows: int = 256
    max_local_tokens: int = 2048
    prefill_share: float = 0.5
    prefill_patience_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """The ports: what differs between a process and a simulation."""

    executor: Executor
    frames: Frames
    transport: Transport
    clock: Clock
    random: Random
    run_blocking: RunBlocking
    offload: Callable[[Callable[[], Any]], Awaitable[Any]]
    timing: Timing = field(default_factory=Timing)
    digest: Digest = field(default_factory=plain)  # the transport serves under it
    tickets: Tickets | None = None  # without keys every request is let in


class HandoffCounts:
    """kvtransfer.ports.Counters of one end (telemetry.handoff_metrics.ENDS), into the worker's metrics."""

    def __init__(self, metrics: WorkerMetrics, end: str) -> None:
        self._end = metrics.handoffs.end(end)
        self._reclaims = metrics.reclaims

    def met(self, peer: WorkerId) -> None:
        self._end.met(peer.name)

    def handoff(self, peer: WorkerId, outcome: State, code: str) -> None:
        self._end.ended(peer.name, outcome.value, code)

    def pages(self, count: int) -> None:
        self._end.pages(count)

    def moved(self, old: State | None, new: State, lasted_s: float) -> None:
        self._end.moved(old.value if old else None, new.value, lasted_s)

    def expired(self, state: State) -> None:
        self._end.expired(state.value)

    def fault(self, peer: WorkerId, code: str) -> None:
        self._end.fault(peer.name, code)

    def held_back(self, key: HandoffKey) -> None:
        self._reclaims.hold(key.of_attempt)

    def let_go(self, key: HandoffKey) -> None:
        self._reclaims.let_go(key.of_attempt)


class Worker:
    """One worker without its sockets."""

    def __init__(self, info: WorkerInfo, model: Model, limits: Limits, machine: Machine, served_name: str) -> None:
        self.info = info
        self.machine = machine
        self.pool = PagePool(machine.frames.pages, epochs=machine.frames.epochs)
        self.metrics = WorkerMetrics(served_name, info.worker.name, machine.clock)
        self.metrics.cache_config(info.page_size, info.pages_total)
        self.metrics.role(info.role.name.lower())
        self.outlet = Outlet(machine.clock)
        self.source: HandoffSource | None = None
        self.receiver: HandoffReceiver | None = None
        self._model = model
        self._chores = Chores()
        self._intake = Intake(model.identity, model.vocabulary, model.max_context_tokens, model.end_ids, machine.clock)
        decode = _decode_policy(info.role, limits)
        self.engine = Engine(
            machine.executor,
            self.pool,
            info.page_size,
            policy_for(info.role, decode, PrefillPolicy(limits.step_tokens)),
            machine.clock,
            machine.run_blocking,
            lambda report: self.tier.on_step(report),
            peer_wait_s=lambda: self.tier.decode.oldest_expected_s if self.tier.decode else 0.0,
        )
        self.tier = WorkerTier(info, self.engine, self.pool, self.metrics, machine.clock)
        self.tier.local = decode.local
        self.tier.gate = Gate(machine.tickets, info)
        if info.role is Role.PREFILL:
            self.tier.prefill = self._prefill_service()
        else:
            self.tier.decode = self._decode_service(limits)

    def start(self) -> asyncio.Task[None]:
        """Begin to step. The returned task ends only by an error of ours, or when it is cancelled."""
        self._chores.every(SWEEP_S, self.tier.sweep, "sweep")
        return asyncio.create_task(self.engine.run(), name="engine")

    async def stop(self) -> None:
        await self._chores.stop()
        for end in (self.source, self.receiver):
            if end is not None:
                await end.stop()

    def metrics_text(self) -> bytes:
        self.tier.measure()
        return self.metrics.text()

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(self._model.identity, self.machine.frames.layout, self.machine.digest.name)

    def _prefill_service(self) -> PrefillService:
        machine, size = self.machine, self.info.page_size
        service = PrefillService(
            self.engine, self._intake, self.outlet, machine.clock, self._spawner("offer"), self.metrics
        )
        borrower = Borrower(
            self.pool,
            size,
            machine.clock,
            self._spawner("loan"),
            self.metrics,
            rate=lambda: self.tier.prefill_rate,
            free_pages=lambda: service.free_pages,
            settled=service.pump,
        )
        outcomes = Outcomes(borrower.on_commit, borrower.on_abort)
        self._join_ends(service.on_closed, borrower, outcomes)
        assert self.source is not None and self.receiver is not None
        service.attach(self.source, borrower)
        borrower.attach(self.receiver)
        self.tier.handoffs = self.source.counts
        return service

    def _decode_service(self, limits: Limits) -> DecodeService:
        machine, takes_handoffs = self.machine, self.info.role is Role.DECODE
        local_tokens = limits.max_local_tokens if takes_handoffs else None
        service = DecodeService(
            self.engine, self._intake, self.outlet, machine.clock, self.metrics, max_local_tokens=local_tokens
        )
        if takes_handoffs:
            lender = Lender(self.engine, self._intake.identity, self._intake.vocabulary, self._spawner("loan"))
            self._join_ends(lender.on_closed, service, Outcomes(service.on_commit, service.on_abort))
            assert self.source is not None and self.receiver is not None
            service.attach(self.receiver)
            lender.attach(self.source)
            self.tier.lender = lender
            self.tier.handoffs = self.receiver.counts
        return service

    def _spawner(self, name: str) -> Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]:
        return lambda coroutine: self._chores.spawn(coroutine, name)

    def _join_ends(self, on_closed: OnClosed, reservations: Reservations, outcomes: Outcomes) -> None:
        """Both ends of the hand-off, over one transport and one pool. One of them has the loans."""
        machine, lends = self.machine, self.info.role is Role.DECODE
        ends = TwoEnds(machine.transport)
        self.source = HandoffSource(
            me=self.info.worker,
            fingerprint=self._fingerprint(),
            pages=self.pool,
            frames=machine.frames,
            transport=ends.source,
            clock=machine.clock,
            random=machine.random,
            offload=machine.offload,
            on_closed=on_closed,
            counters=HandoffCounts(self.metrics, "lender" if lends else "source"),
            timing=machine.timing,
            digest=machine.digest,
        )
        self.receiver = HandoffReceiver(
            me=self.info.worker,
            fingerprint=self._fingerprint(),
            pages=self.pool,
            reservations=reservations,
            transport=ends.receiver,
            clock=machine.clock,
            outcomes=outcomes,
            counters=HandoffCounts(self.metrics, "receiver" if lends else "borrower"),
            timing=machine.timing,
        )
        ends.source.peer_gone, ends.receiver.peer_gone = self.source.peer_gone, self.receiver.peer_gone


def _decode_policy(role: Role, limits: Limits) -> DecodePolicy:
    """On an aggregated worker the prompts are the prefill policy's, without a budget."""
    return DecodePolicy(
        max_rows=limits.max_rows,
        step_tokens=limits.step_tokens,
        local=LocalBudget() if role is Role.DECODE else None,
        prefill_share=limits.prefill_share,
        prefill_patience_s=limits.prefill_patience_s,
    )
