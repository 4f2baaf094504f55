"""Who may decide in the model: Baton's policies, a fixed size, and one policy that moves both tiers together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.scaling.decode import DecodeTarget, decode_need
from baton.scaling.prefill import PrefillTarget, prefill_need
from baton.scaling.steady import Bounds, Decision, Need, Steady, decide
from bench.scaling.fleet import Seen


@dataclass(slots=True)
class OwnPolicies:
    """Each tier by its own signals: what runs behind a real fleet."""

    prefill_target: PrefillTarget
    decode_target: DecodeTarget
    bounds: tuple[Bounds, Bounds]
    states: tuple[Steady, Steady] = field(default_factory=lambda: (Steady(), Steady()))

    def decide(self, seen: Seen) -> tuple[Decision, Decision]:
        needs = (prefill_need(seen.prefill, self.prefill_target), decode_need(seen.decode, self.decode_target))
        first, prefill = decide(self.states[0], needs[0], seen.desired[0], self.bounds[0], seen.now_s)
        second, decode = decide(self.states[1], needs[1], seen.desired[1], self.bounds[1], seen.now_s)
        self.states = (first, second)
        return prefill, decode


@dataclass(frozen=True, slots=True)
class Fixed:
    """No scaling at all."""

    sizes: tuple[int, int]

    def decide(self, seen: Seen) -> tuple[Decision, Decision]:
        return Decision(self.sizes[0], "fixed"), Decision(self.sizes[1], "fixed")


@dataclass(slots=True)
class Together:
    """One signal, requests in flight, for both tiers in a fixed proportion, kept steady in the same way."""

    in_flight_per_prefill: float
    decode_per_prefill: float
    bounds: tuple[Bounds, Bounds]
    state: Steady = field(default_factory=Steady)

    def decide(self, seen: Seen) -> tuple[Decision, Decision]:
        need = Need(seen.in_flight / self.in_flight_per_prefill, f"{seen.in_flight} requests in flight")
        self.state, prefill = decide(self.state, need, seen.desired[0], self.bounds[0], seen.now_s)
        decode = math.ceil(prefill.desired * self.decode_per_prefill)
        within = min(max(decode, self.bounds[1].least), self.bounds[1].most)
        return prefill, Decision(within, prefill.reason)
