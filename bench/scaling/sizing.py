"""How many workers a piece of traffic takes, for whoever knows all of it beforehand: fixed sizes, and plots."""

from __future__ import annotations

import math

from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from bench.scaling.machine import Machine, Slo
from bench.scaling.traffic import Traffic

PEAK_S = 30.0  # a shorter peak is not sized for


def demand(traffic: Traffic, machine: Machine, slo: Slo, window_s: float) -> tuple[list[float], list[float]]:
    """Workers of each tier that each window's arrivals keep as busy as a worker may be. Each list: one a window."""
    windows = max(1, math.ceil(traffic.for_s / window_s))
    prefill, decode = [0.0] * windows, [0.0] * windows
    share = PrefillTarget().busy_share
    running, room_tokens = _decode_capacity(traffic, machine, slo)
    for arrival in traffic.arrivals:
        at = min(windows - 1, int(arrival.at_s / window_s))
        prefill[at] += machine.prefill_s(arrival.input_tokens) / share / window_s
        lives_s = arrival.output_tokens * slo.token_gap_s
        tokens = arrival.input_tokens + arrival.output_tokens / 2 + machine.growth_tokens
        decode[at] += lives_s / window_s * max(tokens / room_tokens, 1 / running)
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


def _decode_capacity(traffic: Traffic, machine: Machine, slo: Slo) -> tuple[float, float]:
    """Sequences of the traffic's mean length that a decode worker runs at the target, and the tokens that it holds."""
    count = max(1, len(traffic.arrivals))
    context = sum(a.input_tokens + a.output_tokens / 2 for a in traffic.arrivals) / count
    each_s = machine.decode_s_per_sequence + machine.decode_s_per_context_token * context
    room_tokens = machine.pages * machine.page_tokens * DecodeTarget().full_share
    return max(1.0, (slo.token_gap_s - machine.decode_fixed_s) / each_s), room_tokens
