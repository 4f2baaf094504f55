"""What a run was worth: how many requests were served well, and what that took."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from bench.scaling.fleet import Course
from bench.scaling.machine import Machine, Slo

SWING_S = 60.0  # a step that is taken back within this time


@dataclass(frozen=True, slots=True)
class Verdict:
    """Shares are of all requests that arrived; hours are of workers, starting and draining ones included."""

    attainment: float
    first_token_attainment: float
    gap_attainment: float
    worker_hours: float
    prefill_hours: float
    decode_hours: float
    decisions_per_h: float  # that changed a tier's size
    swings: int  # up, and down again within a minute
    taken_back: int  # down, and up again within a minute
    refused: int


def judge(course: Course, machine: Machine, slo: Slo) -> Verdict:
    arrived = len(course.jobs) + course.refused
    first = gap = both = 0
    for job in course.jobs:
        alone_s = machine.prefill_s(job.arrival.input_tokens)
        in_time = job.first_token_s is not None and slo.first_token_in_time(job.first_token_s, alone_s)
        steps = max(1, job.arrival.output_tokens - 1)
        if job.ended_s is None or job.first_token_s is None:
            fast = False
        else:
            fast = (job.ended_s - job.arrival.at_s - job.first_token_s - machine.handoff_s) / steps <= slo.token_gap_s
        first, gap, both = first + in_time, gap + fast, both + (in_time and fast)
    of = max(1, arrived)
    changes = [steps_of(course, tier) for tier in (0, 1)]
    hours = course.traffic.for_s / 3600
    return Verdict(
        both / of, first / of, gap / of, sum(course.worker_s) / 3600, course.worker_s[0] / 3600,
        course.worker_s[1] / 3600, sum(len(steps) for steps in changes) / hours,
        sum(swings(steps) for steps in changes), sum(taken_back(steps) for steps in changes), course.refused,
    )  # fmt: skip


def steps_of(course: Course, tier: int) -> list[tuple[float, int]]:
    """(when, by how many) of each decision that changed the size of a tier."""
    steps = []
    for moment in course.moments:
        by = moment.decisions[tier].desired - moment.seen.desired[tier]
        if by:
            steps.append((moment.seen.now_s, by))
    return steps


def swings(steps: list[tuple[float, int]]) -> int:
    return sum(one > 0 > other and then_s - at_s < SWING_S for (at_s, one), (then_s, other) in pairwise(steps))


def taken_back(steps: list[tuple[float, int]]) -> int:
    return sum(one < 0 < other and then_s - at_s < SWING_S for (at_s, one), (then_s, other) in pairwise(steps))
