"""How many workers a tier should have, moment by moment: the pure rules of baton/scaling over what its workers said.

Serve asks ten times a second. Here is decided a few times a second; between, the last decision stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.cluster.spec import RouterTarget
from baton.scaling.decode import DecodeTarget, decode_need
from baton.scaling.prefill import PrefillTarget, prefill_need
from baton.scaling.signals import decode_signals, prefill_signals
from baton.scaling.steady import Bounds, Decision, Need, Steady, decide

PERIOD_S = 0.25

Numbers = Mapping[str, float]  # the newest signals of one worker
NeedOf = Callable[[list[Numbers]], Need]


@dataclass(slots=True)
class TierSize:
    """The decisions about one tier. `ready` is how many workers the last one counted."""

    need_of: NeedOf
    bounds: Bounds
    ready: int = 0
    _steady: Steady = field(default_factory=Steady)
    _last: Decision | None = None
    _decided_s: float = float("-inf")

    def desired(self, workers: list[Numbers], current: int, now_s: float) -> Decision:
        """`workers`: what each that runs has said; those that have said nothing are left out.

        `current`: how many there are to be, as decided last. While nobody says anything nothing is changed.
        """
        if self._last is not None and now_s - self._decided_s < PERIOD_S:
            return self._last
        self._decided_s = now_s
        self.ready = sum(not numbers.get("draining") for numbers in workers)
        if workers:
            self._steady, self._last = decide(self._steady, self.need_of(workers), current, self.bounds, now_s)
        else:
            held = min(max(current, self.bounds.least), self.bounds.most)
            self._last = Decision(held, "no worker says anything yet")
        return self._last


def need_of_prefill(target: PrefillTarget) -> NeedOf:
    return lambda workers: prefill_need(prefill_signals(workers), target)


def need_of_decode(target: DecodeTarget) -> NeedOf:
    return lambda workers: decode_need(decode_signals(workers), target)


def need_of_routers(target: RouterTarget) -> NeedOf:
    """Routers only wait for others: how many requests they carry is all that counts."""

    def need(routers: list[Numbers]) -> Need:
        requests = sum(numbers.get("requests", 0.0) for numbers in routers)
        return Need(requests / target.requests, f"{requests:.0f} requests under way, {target.requests:.0f} to a router")

    return need
