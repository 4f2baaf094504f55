"""Quantiles of the last minute, and of the minutes before it, from a histogram that counts since the start.

Every few seconds the counts are noted; the difference of two notes is what was observed between them. A quantile is
interpolated within its bucket, as Prometheus does it: it is as fine as the buckets are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from core.clock import Clock
from router.histogram import Histogram

TICK_S = 2.0
WINDOW_S = 60.0
HISTORY_S = 300.0
STEP_S = 10.0  # one value of the history
MAX_NOTES = int(HISTORY_S / TICK_S) + 10
HISTORY_QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds; a quantile is None when nothing was observed. `history_p90_s` is the oldest first, one per step."""

    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    observed: int
    window_s: float  # shorter than a minute after a start
    history_p90_s: tuple[float | None, ...] = ()
    history_step_s: float = STEP_S


NOTHING_OBSERVED = Spread(None, None, None, 0, 0.0)


class Recent:
    """Of one histogram. Somebody calls `tick` every TICK_S or so; late ticks make windows coarser, never wrong."""

    def __init__(self, histogram: Histogram, clock: Clock) -> None:
        self._histogram = histogram
        self._clock = clock
        self._notes: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=MAX_NOTES)
        self.tick()

    def tick(self) -> None:
        self._notes.append((self._clock(), self._histogram.counts))

    def spread(self) -> Spread:
        """As of now."""
        now_s, counts = self._clock(), self._histogram.counts
        since_s, before = self._note_at(now_s - WINDOW_S)
        news = _minus(counts, before)
        p50_s, p90_s, p99_s = (quantile(self._histogram.bounds, news, share) for share in (0.5, 0.9, 0.99))
        return Spread(p50_s, p90_s, p99_s, sum(news), now_s - since_s, self._history(now_s, counts))

    def _history(self, now_s: float, counts: tuple[int, ...]) -> tuple[float | None, ...]:
        first_s = self._notes[0][0]
        steps = min(int(HISTORY_S / STEP_S), int((now_s - first_s) / STEP_S))
        edges = [self._note_at(now_s - step * STEP_S)[1] for step in range(steps, 0, -1)] + [counts]
        return tuple(
            quantile(self._histogram.bounds, _minus(after, before), HISTORY_QUANTILE)
            for before, after in pairwise(edges)
        )

    def _note_at(self, time_s: float) -> tuple[float, tuple[int, ...]]:
        """The newest note that is not younger than that; else the oldest there is."""
        at = bisect_right(self._notes, time_s, key=lambda note: note[0])
        return self._notes[max(0, at - 1)]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Of values counted by bucket: `counts` has one more item than `bounds`, for what is above the last of them.

    None without values. Of what is above the last bound no more is known: that bound is said.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        below, low = below + count, bound
    return bounds[-1]


def _minus(after: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(late - early for late, early in zip(after, before, strict=True))
