"""A worker's metrics of its drain: for how long it has drained, and how that ended.

A worker is gone soon after it has counted the outcome; the launcher hears it as a report as well.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

FINISHED = "finished"  # all that had begun
HANDED_BACK = "handed_back"  # the time was over: the rest goes on at other workers
CUT_SHORT = "cut_short"  # told to stop at once, or something could not be let go of in time
OUTCOMES = (FINISHED, HANDED_BACK, CUT_SHORT)


class DrainMetrics:
    """The series of one worker, all there from the start."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        ended = Counter("baton:drain", "Drains, by how they ended", (*labels, "outcome"), registry=registry)
        self._ended = {outcome: ended.labels(**labels, outcome=outcome) for outcome in OUTCOMES}
        lasting = "For how long this worker has been draining; 0: it is not"
        self._lasting_s = Gauge("baton:drain_seconds", lasting, tuple(labels), registry=registry).labels(**labels)

    def lasts(self, drain_s: float) -> None:
        self._lasting_s.set(drain_s)

    def ended(self, outcome: str) -> None:
        self._ended[outcome].inc()
