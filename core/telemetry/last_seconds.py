"""What a worker did in the last seconds, for those who decide how many workers there are: waits, gaps, rates.

Dashboards have histograms and compute such numbers themselves; a decision cannot wait for a scrape.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from core.clock import Clock

WINDOW_S = 5.0
MAX_SAMPLES = 8192  # of one kind; of more in a window the newest count
SHARE = 0.9  # the percentile that is looked at


class Window:
    """Samples of the last seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float) -> None:
        self._samples.append((self._clock(), value))

    def values(self) -> list[float]:
        oldest_s = self._clock() - WINDOW_S
        while self._samples and self._samples[0][0] < oldest_s:
            self._samples.popleft()
        return [value for _, value in self._samples]

    def per_s(self) -> float:
        """The sum of the samples over the whole window, in a young worker too.

        A new worker is given what came to the others before: rates over its short life would count that twice.
        """
        return sum(self.values()) / WINDOW_S

    def high(self, others: Iterable[float] = ()) -> float:
        """The 90th percentile of the samples and of `others`; 0 when there are none."""
        ordered = sorted([*self.values(), *others])
        return ordered[math.ceil(SHARE * len(ordered)) - 1] if ordered else 0.0


class LastSeconds:
    """Of one worker; owned by its event loop."""

    def __init__(self, clock: Clock) -> None:
        self.arrived_tokens = Window(clock)  # of accepted prompts: not cached here, not lent
        self.queue_wait_s = Window(clock)  # of each attempt that has begun to be computed
        self.first_token_s = Window(clock)  # from an attempt's Submit to its first token here
        self.token_gap_s = Window(clock)  # between two tokens of one choice, as they leave
        self.refused_grants = Window(clock)
