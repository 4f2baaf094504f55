"""The same traffic under each decider in turn.

One policy for both tiers is tried at two settings, which were chosen with all made traffic known: one at which it takes
about as many worker-hours as Baton's policies do, and one at which it serves about as many requests well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from baton.scaling.steady import Bounds
from bench.scaling.deciders import Fixed, OwnPolicies, Together
from bench.scaling.fleet import Course, Decider, Fleet
from bench.scaling.judge import Verdict, judge
from bench.scaling.machine import Machine, Slo
from bench.scaling.sizing import first_minute, mean_sized, peak_sized
from bench.scaling.traffic import Traffic

BOUNDS = (Bounds(1, 16), Bounds(1, 16))
DECODE_PER_PREFILL = 1 / 3
FRUGAL_IN_FLIGHT, LAVISH_IN_FLIGHT = 22.0, 8.0  # for each prefill worker
CONTENDERS = ("peak-sized", "mean-sized", "Baton", "one policy, frugal", "one policy, lavish")


@dataclass(frozen=True, slots=True)
class Row:
    traffic: str
    contender: str
    start: tuple[int, int]
    verdict: Verdict
    course: Course


def own_policies(slo: Slo) -> OwnPolicies:
    """What a cluster file with these targets gives."""
    return OwnPolicies(PrefillTarget(slo.first_token_s), DecodeTarget(slo.token_gap_s), BOUNDS)


def run(traffic: Traffic, contender: str, machine: Machine, slo: Slo) -> Row:
    decider, start = _contender(traffic, contender, machine, slo)
    course = Fleet(machine, decider, start).run(traffic)
    return Row(traffic.name, contender, start, judge(course, machine, slo), course)


def contest(traffics: list[Traffic], machine: Machine, slo: Slo) -> Iterator[Row]:
    for traffic in traffics:
        for contender in CONTENDERS:
            yield run(traffic, contender, machine, slo)


def _contender(traffic: Traffic, name: str, machine: Machine, slo: Slo) -> tuple[Decider, tuple[int, int]]:
    if name == "peak-sized":
        sizes = peak_sized(traffic, machine, slo)
        return Fixed(sizes), sizes
    if name == "mean-sized":
        sizes = mean_sized(traffic, machine, slo)
        return Fixed(sizes), sizes
    start = first_minute(traffic, machine, slo)
    if name == "Baton":
        return own_policies(slo), start
    in_flight = FRUGAL_IN_FLIGHT if name == "one policy, frugal" else LAVISH_IN_FLIGHT
    return Together(in_flight, DECODE_PER_PREFILL, BOUNDS), start
