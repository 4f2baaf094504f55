"""The modelled fleet: two tiers of workers, a router, and whoever decides how many there should be.

Once a second the decider is shown what the tiers report, folded, and says how many workers it wants. A worker that is
added takes its time to start. One that is given up is the youngest: one that has not started is gone at once, another
one finishes what it has. Prompts stay with the pair that they were given to, as they do behind the router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from baton.scaling.decode import DecodeSignals
from baton.scaling.prefill import PrefillSignals
from baton.scaling.signals import decode_signals, prefill_signals
from baton.scaling.steady import Decision
from bench.scaling.events import Events
from bench.scaling.machine import Machine
from bench.scaling.traffic import Arrival, Traffic
from bench.scaling.workers import DecodeWorker, Job, PrefillWorker, Worker

W = TypeVar("W", bound=Worker)

SAMPLE_S = 0.5
DECIDE_S = 1.0
PATIENCE_S = 15.0  # a request that would wait longer for a prefill worker is refused, as the router does


@dataclass(frozen=True, slots=True)
class Seen:
    """What a decider knows: signals of both tiers, and how many workers were wanted last."""

    now_s: float
    prefill: PrefillSignals
    decode: DecodeSignals
    desired: tuple[int, int]
    in_flight: int


class Decider(Protocol):
    """How many (prefill, decode) workers there should be."""

    def decide(self, seen: Seen) -> tuple[Decision, Decision]: ...


@dataclass(frozen=True, slots=True)
class Moment:
    """One decision of the run, for plots and for tests."""

    seen: Seen
    decisions: tuple[Decision, Decision]
    tokens_per_s: tuple[float, float]  # asked for since the last moment: of prompts, of answers


@dataclass(slots=True)
class Course:
    """A whole run."""

    traffic: Traffic
    jobs: list[Job] = field(default_factory=list)
    refused: int = 0
    moments: list[Moment] = field(default_factory=list)
    worker_s: tuple[float, float] = (0.0, 0.0)


class Fleet:
    def __init__(self, machine: Machine, decider: Decider, start: tuple[int, int]) -> None:
        self.events = Events()
        self._machine, self._decider = machine, decider
        self._prefill = [PrefillWorker(self.events, machine, 0.0) for _ in range(start[0])]
        self._decode = [self._new_decode(0.0) for _ in range(start[1])]
        self._desired = start
        self._in_flight = 0
        self._asked = (0, 0)

    def run(self, traffic: Traffic) -> Course:
        """Plays the traffic, then lets what is under way end. Worker-seconds count while there is traffic."""
        self._course = Course(traffic)
        for arrival in traffic.arrivals:
            self.events.at(arrival.at_s, lambda arrival=arrival: self._submit(arrival))  # type: ignore[misc]
        self._every(SAMPLE_S, traffic.for_s, self._sample)
        self._every(DECIDE_S, traffic.for_s, self._decide)
        self.events.run(traffic.for_s)
        hours = (self._worker_s(self._prefill, traffic.for_s), self._worker_s(self._decode, traffic.for_s))
        self._every(SAMPLE_S, traffic.for_s + 600.0, self._sample)
        self.events.run(traffic.for_s + 600.0)
        self._course.worker_s = hours
        return self._course

    def _every(self, period_s: float, until_s: float, call: Callable[[], None]) -> None:
        def again() -> None:
            call()
            if self.events.now_s + period_s <= until_s:
                self.events.at(self.events.now_s + period_s, again)

        self.events.at(self.events.now_s + period_s, again)

    def _new_decode(self, ready_s: float) -> DecodeWorker:
        return DecodeWorker(self.events, self._machine, ready_s, self._ended)

    def _ended(self, job: Job) -> None:
        self._in_flight -= 1

    def _submit(self, arrival: Arrival) -> None:
        self._asked = (self._asked[0] + arrival.input_tokens, self._asked[1] + arrival.output_tokens)
        prefill = min((w for w in self._prefill if w.ready), key=lambda w: w.work_s, default=None)
        decode = min((w for w in self._decode if w.ready), key=lambda w: w.load_tokens, default=None)
        if prefill is None or decode is None or prefill.work_s > PATIENCE_S:
            self._course.refused += 1
            return
        job = Job(arrival, prefill, decode)
        self._in_flight += 1
        self._course.jobs.append(job)
        decode.submit(job)
        prefill.submit(job)

    def _sample(self) -> None:
        for worker in self._decode:
            if worker.gone_s is None:
                worker.sample()

    def _decide(self) -> None:
        prefill = prefill_signals([w.numbers() for w in self._up(self._prefill)])
        seen = Seen(
            self.events.now_s, prefill, decode_signals([w.numbers() for w in self._up(self._decode)]),
            self._desired, self._in_flight,
        )  # fmt: skip
        decisions = self._decider.decide(seen)
        self._scale(self._prefill, decisions[0].desired, lambda at_s: PrefillWorker(self.events, self._machine, at_s))
        self._scale(self._decode, decisions[1].desired, self._new_decode)
        self._desired = (decisions[0].desired, decisions[1].desired)
        asked = (self._asked[0] / DECIDE_S, self._asked[1] / DECIDE_S)
        self._course.moments.append(Moment(seen, decisions, asked))
        self._asked = (0, 0)

    def _up(self, workers: list[W]) -> list[W]:
        """Those that report: ready or draining."""
        return [w for w in workers if w.gone_s is None and w.ready_s <= self.events.now_s]

    def _scale(self, workers: list[W], desired: int, make: Callable[[float], W]) -> None:
        kept = [w for w in workers if w.gone_s is None and not w.draining]
        for _ in range(desired - len(kept)):
            workers.append(make(self.events.now_s + self._machine.start_s))
        for worker in kept[desired:]:
            worker.draining = True
            worker.leave_if_empty()

    def _worker_s(self, workers: Sequence[Worker], until_s: float) -> float:
        return sum((until_s if w.gone_s is None else w.gone_s) - w.asked_s for w in workers)
