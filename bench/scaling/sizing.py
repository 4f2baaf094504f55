"""How many workers a piece of traffic takes, for whoever knows all of it beforehand: fixed sizes, and plots."""

from __future__ import annotations

import math

from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from bench.scaling.machine import Machine, Slo
from bench.scaling.traffic import Arrival, Traffic

PEAK_S = 30.0  # a shorter peak is not sized for


def demand(traffic: Traffic, machine: Machine, slo: Slo, window_s: float) -> tuple[list[float], list[float]]:
    """Workers of each tier that each window's arrivals keep as busy as a worker may be. Each list: one a window."""
    windows = max(1, math.ceil(traffic.for_s / window_s))
    prefill, decode = [0.0] * windows, [0.0] * windows
    share = PrefillTarget().busy_share
    for arrival in traffic.arrivals:
        at = min(windows - 1, int(arrival.at_s / window_s))
        prefill[at] += machine.prefill_s(arrival.input_tokens) / share / window_s
        lives_s = arrival.output_tokens * slo.token_gap_s
        decode[at] += _decode_share(arrival, machine, slo) * lives_s / window_s
    return prefill, decode


def mean_sized(traffic: Traffic, machine: Machine, slo: Slo) -> tuple[int, int]:
    prefill, decode = demand(traffic, machine, slo, traffic.for_s)
    return max(1, math.ceil(prefill[0])), max(1, math.ceil(decode[0]))


def peak_sized(traffic: Traffic, machine: Machine, slo: Slo) -> tuple[int, int]:
    prefill, decode = demand(traffic, machine, slo, PEAK_S)
    return max(1, math.ceil(max(prefill))), max(1, math.ceil(max(decode)))


def first_minute(traffic: Traffic, machine: Machine, slo: Slo) -> tuple[int, int]:
    """What a fleet that scales begins with: it has not just been switched on."""
    prefill, decode = demand(traffic, machine, slo, 60.0)
    return max(1, math.ceil(prefill[0])), max(1, math.ceil(decode[0]))


def _decode_share(arrival: Arrival, machine: Machine, slo: Slo) -> float:
    """The share of a decode worker that one sequence takes: of its pages or of its time, whichever is more."""
    context = arrival.input_tokens + arrival.output_tokens / 2
    of_pages = (context + machine.growth_tokens) / (machine.pages * machine.page_tokens * DecodeTarget().full_share)
    takes_s = machine.decode_s_per_sequence + machine.decode_s_per_context_token * context
    return max(of_pages, takes_s / (slo.token_gap_s - machine.decode_fixed_s))
