"""The drain of one worker: nothing new is taken, what it has is finished, and in the end the rest is handed back.

    told --> queued work to others, if there are any --> what has begun is finished ------------> finished
                                                             `--margin before the deadline:
                                                                the rest goes back to routers --> handed back
                                                                  `--deadline ------------------> cut short

Handing back costs nobody anything: routers place the work on other workers, with the tokens that clients have. Where
there is no other worker, nothing is handed back before its time: its queue is better served late than not at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.composition import Worker
from core.telemetry.drain_metrics import CUT_SHORT, FINISHED, HANDED_BACK

log = logging.getLogger(__name__)

LOOK_S = 0.05
LEAST_S = 0.5  # or a quarter of the time: what routers sent before they heard of it still comes, and is answered
MARGIN_S = 2.0  # before the deadline, or a quarter of the time: routers hear of it, and readers of pages are heard


class Drain:
    """`has_successor`: whether another worker could take work over now."""

    def __init__(self, worker: Worker, drain_s: float, has_successor: Callable[[], bool]) -> None:
        self._worker = worker
        self._clock = worker.machine.clock
        self._drain_s = drain_s
        self._has_successor = has_successor
        self._metrics = worker.metrics.drains

    async def run(self) -> str:
        """The outcome, once nothing is held here, or the time is over. The caller then ends the worker."""
        began_s, tier = self._clock(), self._worker.tier
        margin_s = min(MARGIN_S, self._drain_s / 4)
        handed_back = 0
        tier.drain()
        log.info("draining: %d s at most", self._drain_s)
        while (self._clock() - began_s < min(LEAST_S, self._drain_s / 4)) or not self._is_idle():
            lasting_s = self._clock() - began_s
            self._metrics.lasts(lasting_s)
            if lasting_s >= self._drain_s:
                return self._end(CUT_SHORT, lasting_s)
            if lasting_s >= self._drain_s - margin_s:
                handed_back += tier.hand_back(begun=True)
            elif self._has_successor():
                tier.hand_back(begun=False)
            await asyncio.sleep(LOOK_S)
        return self._end(HANDED_BACK if handed_back else FINISHED, self._clock() - began_s)

    def _end(self, outcome: str, lasting_s: float) -> str:
        self._metrics.lasts(lasting_s)
        self._metrics.ended(outcome)
        log.info("drained for %.1f s: %s", lasting_s, outcome)
        return outcome

    def _is_idle(self) -> bool:
        """Nothing runs, no peer reads our pages any more, and routers have been told everything."""
        worker = self._worker
        ends = (worker.source, worker.receiver)
        at_rest = worker.engine.is_idle and all(end is None or end.idle for end in ends)
        return at_rest and not worker.outlet.live and worker.outlet.is_sent
