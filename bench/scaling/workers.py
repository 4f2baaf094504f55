"""The modelled workers: a queue of prompts, and a batch of sequences over a pool of pages.

A decode worker is not stepped: between two changes of its batch all its sequences advance at one pace, so a sequence
ends when the tokens that each has got since the start reach the count that it joined at plus its own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.scaling.events import Events
from bench.scaling.machine import Machine
from bench.scaling.traffic import Arrival

WINDOW_S = 5.0  # what "lately" means in a worker's report
BACKOFF_S = 0.25  # a prompt that found no room asks again so often


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way; times from the start of the run."""

    arrival: Arrival
    prefill: PrefillWorker
    decode: DecodeWorker
    granted: bool = False
    begun_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None


@dataclass(eq=False, slots=True)
class Lately:
    """Pairs of a time and a number, of the last seconds only."""

    pairs: deque[tuple[float, float]] = field(default_factory=deque)

    def add(self, now_s: float, number: float) -> None:
        self.pairs.append((now_s, number))

    def values(self, now_s: float) -> list[float]:
        while self.pairs and self.pairs[0][0] <= now_s - WINDOW_S:
            self.pairs.popleft()
        return [number for _, number in self.pairs]


def ninetieth(values: list[float]) -> float:
    """The 90th percentile; 0 of nothing."""
    return sorted(values)[max(0, -(-9 * len(values) // 10) - 1)] if values else 0.0


class Worker:
    """Starting until `ready_s`, then ready; a draining one takes nothing new and is gone when it is empty."""

    def __init__(self, events: Events, machine: Machine, ready_s: float) -> None:
        self.events, self.machine = events, machine
        self.asked_s, self.ready_s = events.now_s, ready_s
        self.draining = False
        self.gone_s: float | None = None

    @property
    def ready(self) -> bool:
        return self.gone_s is None and not self.draining and self.ready_s <= self.events.now_s

    def empty(self) -> bool:
        raise NotImplementedError

    def leave_if_empty(self) -> None:
        if self.draining and self.gone_s is None and self.empty():
            self.gone_s = self.events.now_s


class PrefillWorker(Worker):
    """Computes one prompt after the other, each with the room at its decode worker in hand."""

    def __init__(self, events: Events, machine: Machine, ready_s: float) -> None:
        super().__init__(events, machine, ready_s)
        self.queue: deque[Job] = deque()
        self.bound = 0  # jobs that are here or wait for room elsewhere
        self.work_s = 0.0  # of what is bound and not computed
        self._computing: Job | None = None
        self._arrived, self._waits, self._firsts = Lately(), Lately(), Lately()
        self._busy = (0.0, 0.0)  # tokens and seconds of what was computed, older ones fading

    def empty(self) -> bool:
        return self.bound == 0

    def submit(self, job: Job) -> None:
        self.bound += 1
        self.work_s += self.machine.prefill_s(job.arrival.input_tokens)
        self._arrived.add(self.events.now_s, job.arrival.input_tokens)
        self.queue.append(job)
        self.go_on()

    def granted(self, job: Job) -> None:
        """Room was found for one that waited for it: it is the oldest."""
        self.queue.appendleft(job)
        self.go_on()

    def go_on(self) -> None:
        while self._computing is None and self.queue:
            job = self.queue.popleft()
            if not job.decode.reserve(job):
                continue
            self._computing, job.begun_s = job, self.events.now_s
            self._waits.add(self.events.now_s, self.events.now_s - job.arrival.at_s)
            self.events.at(self.events.now_s + self.machine.prefill_s(job.arrival.input_tokens), self._computed)

    def _computed(self) -> None:
        job, self._computing = self._computing, None
        assert job is not None
        now_s, took_s = self.events.now_s, self.machine.prefill_s(job.arrival.input_tokens)
        self.bound -= 1
        self.work_s -= took_s
        self._busy = (self._busy[0] * 0.9 + job.arrival.input_tokens, self._busy[1] * 0.9 + took_s)
        job.first_token_s = now_s - job.arrival.at_s
        self._firsts.add(now_s, job.first_token_s)
        self.events.at(now_s + self.machine.handoff_s, lambda: job.decode.join(job))
        self.go_on()
        self.leave_if_empty()

    def numbers(self) -> dict[str, float]:
        """What a prefill worker reports. What waits for room at a decode worker is none of its backlog."""
        now_s = self.events.now_s
        computing = 0.0
        if self._computing is not None:
            tokens, begun_s = self._computing.arrival.input_tokens, self._computing.begun_s or 0.0
            computing = tokens * max(0.0, 1 - (now_s - begun_s) / self.machine.prefill_s(tokens))
        waits = self._waits.values(now_s) + [now_s - job.arrival.at_s for job in self.queue]
        return {
            "arriving_tokens_per_s": sum(self._arrived.values(now_s)) / WINDOW_S,
            "queued_tokens": int(computing) + sum(job.arrival.input_tokens for job in self.queue),
            "queue_wait_s": ninetieth(waits),
            "first_token_s": ninetieth(self._firsts.values(now_s)),
            "tokens_per_s": self._busy[0] / self._busy[1] if self._busy[1] else 0.0,
            "draining": float(self.draining),
        }


class DecodeWorker(Worker):
    """Grants rooms as the decode service does: all that is held, with room for growth, has to fit."""

    def __init__(self, events: Events, machine: Machine, ready_s: float, ended: Callable[[Job], None]) -> None:
        super().__init__(events, machine, ready_s)
        self.waiting: deque[Job] = deque()  # refused for now, oldest first
        self.expected = 0  # submitted here, not joined yet
        self.expected_tokens = 0
        self._ended = ended
        self._reserved_tokens = 0
        self._reserved = 0
        self._running: list[tuple[float, int, Job]] = []  # by the pace at which each ends
        self._pace = 0.0  # tokens that a sequence has got that ran since the start
        self._seen_s = 0.0
        self._context_base = 0.0  # context = base + pace x running
        self._version = 0
        self._number = 0
        self._refusals = Lately()
        self._gaps = Lately()

    def empty(self) -> bool:
        return not self._running and self.expected == 0

    def submit(self, job: Job) -> None:
        self.expected += 1
        self.expected_tokens += job.arrival.input_tokens

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def context_tokens(self) -> float:
        return self._context_base + self._pace * len(self._running)

    @property
    def projected_pages(self) -> int:
        """Held and reserved, with the growth of each."""
        return self._pages(self._reserved_tokens, len(self._running) + self._reserved)

    def _pages(self, coming_tokens: int, sequences: int) -> int:
        tokens = self.context_tokens + coming_tokens + self.machine.growth_tokens * sequences
        return int(tokens / self.machine.page_tokens)

    @property
    def load_tokens(self) -> float:
        """What a router compares: all that is here and all that will come."""
        return self.context_tokens + self.expected_tokens

    def reserve(self, job: Job) -> bool:
        """Room for a prompt; without it the job waits here, and its worker hears of it again."""
        if job.granted:
            return True  # while it waited
        if not self._fits(job):
            self._refusals.add(self.events.now_s, 1.0)
            self.waiting.append(job)
            return False
        self._take(job)
        return True

    def _fits(self, job: Job) -> bool:
        self._advance()
        more = (job.arrival.input_tokens + self.machine.growth_tokens) / self.machine.page_tokens
        alone = not self._running and not self._reserved
        return alone or self.projected_pages + more <= self.machine.pages

    def _take(self, job: Job) -> None:
        job.granted = True
        self._reserved += 1
        self._reserved_tokens += job.arrival.input_tokens

    def join(self, job: Job) -> None:
        """The pages have come; token 0 came with them."""
        self._advance()
        tokens = job.arrival.input_tokens
        self._reserved -= 1
        self._reserved_tokens -= tokens
        self.expected -= 1
        self.expected_tokens -= tokens
        if job.arrival.output_tokens > 1:
            self._number += 1
            heapq.heappush(self._running, (self._pace + job.arrival.output_tokens - 1, self._number, job))
            self._context_base += tokens - self._pace
        else:
            self._end(job)
        self._changed()

    def _advance(self) -> None:
        if self._running:
            gap_s = self.machine.step_s(len(self._running), self.context_tokens)
            self._pace += (self.events.now_s - self._seen_s) / gap_s
        self._seen_s = self.events.now_s

    def _changed(self) -> None:
        """Lets in who waited, and looks again when the next sequence ends at this pace."""
        while self.waiting and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            self._take(job)
            job.prefill.granted(job)
        self._version += 1
        if self._running:
            version = self._version
            left = self._running[0][0] - self._pace
            gap_s = self.machine.step_s(len(self._running), self.context_tokens)
            self.events.at(self.events.now_s + max(left, 0.0) * gap_s, lambda: self._look(version))

    def _look(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        while self._running and self._running[0][0] <= self._pace + 1e-6:
            ends_at, _, job = heapq.heappop(self._running)
            self._context_base -= job.arrival.input_tokens - (ends_at - job.arrival.output_tokens + 1)
            self._end(job)
        self._changed()
        self.leave_if_empty()

    def _end(self, job: Job) -> None:
        job.ended_s = self.events.now_s
        self._ended(job)

    def sample(self) -> None:
        """Notes the gap of now. Called by the fleet's clock, and paces the batch anew: its contexts have grown."""
        self._advance()
        if self._running:
            self._gaps.add(self.events.now_s, self.machine.step_s(len(self._running), self.context_tokens))
        for _ in self.waiting:
            self._refusals.add(self.events.now_s, 0.5 / BACKOFF_S)
        self._changed()

    def numbers(self) -> dict[str, float]:
        """What a decode worker reports."""
        now_s = self.events.now_s
        return {
            "projected_pages": self._pages(self.expected_tokens, len(self._running) + self.expected),
            "pages_total": self.machine.pages,
            "running": self.running,
            "token_gap_s": ninetieth(self._gaps.values(now_s)),
            "refused_grants_per_s": sum(self._refusals.values(now_s)) / WINDOW_S,
            "draining": float(self.draining),
        }
