"""The step loop: plan, build, execute, apply. Owns the sequences and the pool; both tiers run it under their policy.

One step, in four lines (`Engine.step`): the policy turns a snapshot into a plan; the plan becomes a batch; the executor
runs it on its compute thread; the results are applied and reported. Everything but `execute` runs on the thread of the
event loop, so nothing is locked. A sequence that leaves while a step is in flight gives its pages back only when that
step has ended (the step fence).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import BatonError, EngineError
from core.messages import FinishReason
from engine.batch import Batch, Executor, PageCopy, Row, RowResult, SampledToken
from engine.builder import build_row
from engine.canary import FRESH_S, canary, fault_of
from engine.policy import EngineView, Policy, SequenceView, StepPlan
from engine.pool import PagePool
from engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

RunBlocking = Callable[[Callable[[Batch], list[RowResult]], Batch], Awaitable[list[RowResult]]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of one choice; `sequence` holds it already."""

    sequence: Sequence
    choice: int
    token: SampledToken
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for the services: tokens to send, chunks written, requests that failed."""

    sampled: tuple[Sampled, ...] = ()
    advanced: tuple[Sequence, ...] = ()  # sequences whose KV went on without a token being sampled
    failed: tuple[tuple[Sequence, BatonError], ...] = ()
    tokens: int = 0
    step_s: float = 0.0


class Engine:
    """Raises nothing of its own: a failed step is reported as the error of its sequences."""

    def __init__(
        self,
        executor: Executor,
        pool: PagePool,
        page_size: int,
        policy: Policy,
        clock: Clock,
        run_blocking: RunBlocking,
        report: Callable[[StepReport], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        peer_wait_s: Callable[[], float] = lambda: 0.0,
        step_fence: bool = True,
    ) -> None:
        """`step_fence` False: pages go back while a step may touch them. Only tests do that, to see it missed."""
        self.pool = pool
        self.page_size = page_size
        self._executor = executor
        self._policy = policy
        self._clock = clock
        self._run_blocking = run_blocking
        self._report = report
        self._sleep = sleep
        self._peer_wait_s = peer_wait_s
        self._step_fence = step_fence
        self._sequences: dict[int, Sequence] = {}
        self._departing: list[Sequence] = []  # left during a step: their pages wait for its end
        self._in_flight = False
        self._wake = asyncio.Event()
        self._turns: list[asyncio.Future[None]] = []
        self._next_id = 0
        self._step_s = 0.0  # the last one's duration
        self._proved_s = float("-inf")  # when a step last gave results
        self.steps = 0
        self.preemptions = 0
        pool.on_room = self.wake

    # --- what the services call ------------------------------------------------------------------------------

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def add(self, sequence: Sequence) -> None:
        """A sequence without pages waits for its admission; one with pages (reserved or handed off) runs."""
        if sequence.pages:
            sequence.status = Status.RUNNING
            sequence.first_admitted_s = sequence.first_admitted_s or self._clock()
        self._sequences[sequence.sequence_id] = sequence
        self.wake()

    def remove(self, sequence: Sequence) -> None:
        """Finished, cancelled or failed: its pages go back at the step fence, its full ones into the cache."""
        self._sequences.pop(sequence.sequence_id, None)
        if sequence.status is Status.DEPARTED:
            return
        sequence.status = Status.DEPARTED
        if self._in_flight and self._step_fence:
            self._departing.append(sequence)
        else:
            self._give_back(sequence)

    def reserve(self, sequence: Sequence) -> bool:
        """Pages for all ids of a sequence: the longest cached prefix and fresh ones. All or nothing."""
        hashes = sequence.full_hashes(self.page_size)
        usable = (len(sequence.ids) - 1) // self.page_size  # one id at least is computed: its logits are wanted
        prefix = self.pool.lookup(hashes[:usable])
        self.pool.acquire(prefix)
        fresh = self.pool.allocate(-(-len(sequence.ids) // self.page_size) - len(prefix))
        if fresh is None:
            self.pool.release_all(prefix)
            return False
        sequence.pages = prefix + fresh
        sequence.registered = len(prefix)
        sequence.computed = len(prefix) * self.page_size
        if sequence.first_admitted_s is None:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
        return True

    def adopt(self, sequence: Sequence, pages: list[int], computed: int) -> None:
        """A sequence whose first `computed` tokens lie in `pages`, which it owns from now on: it runs at once."""
        sequence.pages = pages
        self._advance(sequence, computed)
        self.add(sequence)

    def zero_tail(self, page: int, used_tokens: int) -> None:
        """Zero an owned page past its content. No step in flight may use it."""
        self._executor.zero_tail(page, used_tokens)

    async def turn(self) -> None:
        """Returns when the loop has come round and the model computes: a step has shown it, or a canary does.

        Raises EngineError when the canary fails. The caller sets the deadline.
        """
        passed = asyncio.get_running_loop().create_future()
        self._turns.append(passed)
        self.wake()
        await passed

    def wake(self) -> None:
        self._wake.set()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._sequences.values())

    @property
    def is_idle(self) -> bool:
        return not self._sequences and not self._in_flight

    # --- the loop --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Steps until cancelled; sleeps while there is nothing to do."""
        while True:
            self._wake.clear()
            try:
                plan = self._policy.plan(self.view())
                stepped = await self.step(plan)
                await self._pass_turns()
                if stepped:
                    await self._sleep(plan.pause_s)  # 0: only let the other tasks of this thread run
                    continue
            except Exception:
                log.exception("the step loop failed: every sequence ends with it, the worker goes on")
                self._fail_all(EngineError("the engine failed: see the worker's log"))
            await self._wake.wait()

    def _fail_all(self, error: EngineError) -> None:
        failed = tuple((sequence, error) for sequence in self._sequences.values())
        for sequence, _ in failed:
            self.remove(sequence)
        self._pass_fence()
        self._report(StepReport(failed=failed))
        self._answer_turns(error)

    async def _pass_turns(self) -> None:
        if not self._turns:
            return
        error = None
        if self._clock() - self._proved_s > FRESH_S:
            error = fault_of(await self._execute(canary()))
            self._pass_fence()
        self._answer_turns(error)

    def _answer_turns(self, error: EngineError | None) -> None:
        turns, self._turns = self._turns, []
        for passed in turns:
            if not passed.done() and error is not None:
                passed.set_exception(error)
            elif not passed.done():
                passed.set_result(None)

    def _pass_fence(self) -> None:
        """No step is in flight: whoever left during the last one gives its pages back."""
        for sequence in self._departing:
            self._give_back(sequence)
        self._departing.clear()

    async def step(self, plan: StepPlan) -> bool:
        """One step. False if the plan came to nothing."""
        for sequence_id in plan.preempt:
            self._preempt(self._sequences[sequence_id])
        scheduled = self._schedule(plan)
        if not scheduled:
            return False
        batch, began_s = self._build(scheduled), self._clock()
        results = await self._execute(batch)
        self._apply(scheduled, batch, results, self._clock() - began_s)
        return True

    def view(self) -> EngineView:
        views = tuple(self._view_of(sequence) for sequence in self._sequences.values())
        return EngineView(self._clock(), views, self.pool.reusable, self.page_size, self._step_s, self._peer_wait_s())

    def _view_of(self, sequence: Sequence) -> SequenceView:
        needed = -(-len(sequence.ids) // self.page_size)
        return SequenceView(
            sequence.sequence_id,
            sequence.status is Status.RUNNING,
            sequence.is_decoding,
            sequence.uncomputed,
            len(sequence.ids),
            needed - len(sequence.pages),
            len(sequence.pages),
            sequence.priority,
            sequence.arrived_s,
            sequence.deadline_s,
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Its pages go back (the full ones stay in the cache while they can); it waits to be computed again."""
        self._give_back(sequence)
        sequence.recomputed_tokens += sequence.computed
        sequence.computed = sequence.registered = 0
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.status = Status.WAITING

    def _schedule(self, plan: StepPlan) -> list[tuple[Sequence, int]]:
        """The plan's rows whose pages can be had, with the tokens each really computes."""
        scheduled = []
        for sequence_id, tokens in plan.rows:
            sequence = self._sequences[sequence_id]
            if self._has_room(sequence):
                scheduled.append((sequence, min(tokens, sequence.uncomputed)))
        return scheduled

    def _has_room(self, sequence: Sequence) -> bool:
        if sequence.status is Status.WAITING:
            if not self.reserve(sequence):
                return False
            sequence.status = Status.RUNNING
            sequence.first_admitted_s = sequence.first_admitted_s or self._clock()
            return True
        missing = -(-len(sequence.ids) // self.page_size) - len(sequence.pages)
        fresh = self.pool.allocate(missing) if missing > 0 else []
        if fresh is None:
            return False
        sequence.pages += fresh
        return True

    def _build(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        rows: tuple[Row, ...] = tuple(build_row(sequence, tokens) for sequence, tokens in scheduled)
        copies = tuple(
            PageCopy(sequence.copy_from, sequence.pages[sequence.computed // self.page_size])
            for sequence, _ in scheduled
            if sequence.copy_from is not None
        )
        return Batch(rows, copies)

    async def _execute(self, batch: Batch) -> list[RowResult]:
        self._in_flight = True
        try:
            results = await self._run_blocking(self._executor.execute, batch)
            self._proved_s = self._clock()
            return results
        except EngineError as error:
            log.error("step failed: %s", error)
            return [RowResult(error=error.message)] * len(batch.rows)
        finally:
            self._in_flight = False

    # --- results ---------------------------------------------------------------------------------------------

    def _apply(
        self, scheduled: list[tuple[Sequence, int]], batch: Batch, results: list[RowResult], step_s: float
    ) -> None:
        """Advance every sequence of the step, report, and let those go that left while it ran."""
        self.steps += 1
        self._step_s = step_s
        sampled: list[Sampled] = []
        advanced: list[Sequence] = []
        failed: list[tuple[Sequence, BatonError]] = []
        for (sequence, tokens), result in zip(scheduled, results, strict=True):
            if sequence.status is Status.DEPARTED:
                continue
            if result.error is not None:
                failed.append((sequence, EngineError(result.error)))
                self.remove(sequence)
                continue
            self._advance(sequence, tokens)
            if result.sampled:
                sampled += self._append(sequence, result.sampled)
            else:
                advanced.append(sequence)
        self._pass_fence()
        report = StepReport(tuple(sampled), tuple(advanced), tuple(failed), batch.tokens, step_s)
        self._report(report)

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        """The KV of its next tokens is written; full pages enter the prefix cache at once."""
        sequence.computed += tokens
        self._end_copy(sequence)
        full = sequence.computed // self.page_size
        if full > sequence.registered:
            hashes = sequence.full_hashes(self.page_size)
            for position in range(sequence.registered, full):
                self.pool.register(sequence.pages[position], hashes[position])
            sequence.registered = full

    def _append(self, sequence: Sequence, tokens: tuple[SampledToken, ...]) -> list[Sampled]:
        """Give each choice its token. Several choices part ways here: they share the full pages of the prompt."""
        if sequence.single_step:  # sealed for a hand-off: its pages stay until that is closed
            self._sequences.pop(sequence.sequence_id, None)
            finishes = [sequence.finish_after(token.token_id) for token in tokens]
            return [Sampled(sequence, *item) for item in zip(sequence.choices, tokens, finishes, strict=True)]
        choices, sequence.choices = sequence.choices, sequence.choices[:1]
        branches = [sequence, *(self.branch(sequence, choice) for choice in choices[1:])]
        sampled = []
        for branch, token in zip(branches, tokens, strict=True):
            finish = branch.finish_after(token.token_id)
            branch.ids.append(token.token_id)
            sampled.append(Sampled(branch, branch.choices[0], token, finish))
            if finish is not None:
                self.remove(branch)
        return sampled

    def branch(self, sequence: Sequence, choice: int) -> Sequence:
        """A second holder of the same KV, for another choice: full pages are shared, the tail page is copied.

        The copy is made in the branch's first step; until then it co-owns the page that it copies from. When no page is
        left for its tail, the branch waits like a preempted sequence and finds its prefix cached.
        """
        full, used = divmod(sequence.computed, self.page_size)
        tail = self.pool.allocate(1 if used else 0)
        twin = sequence.twin(self.new_id(), choice)
        if tail is not None:
            twin.computed, twin.registered = sequence.computed, sequence.registered
            twin.status = Status.RUNNING
            twin.pages = sequence.pages[:full] + tail
            self.pool.acquire(sequence.pages[:full])
            if used:
                twin.copy_from = sequence.pages[full]
                self.pool.acquire([twin.copy_from])
        self._sequences[twin.sequence_id] = twin
        return twin

    def _end_copy(self, sequence: Sequence) -> None:
        if sequence.copy_from is not None:
            self.pool.release(sequence.copy_from)
            sequence.copy_from = None

    def _give_back(self, sequence: Sequence) -> None:
        self._end_copy(sequence)
        self.pool.release_all(sequence.pages)
        sequence.pages = []
