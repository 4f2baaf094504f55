"""How much extra load failures may cause: retries draw on a budget that requests fill, and are never free."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from core.messages import WorkerId

RETRY_SHARE = 0.2  # of the offered requests
MAX_REPLAYS = 2  # of one request, after its first attempt
POISON_WORKERS = 2  # a request that has cost so many is refused for good
MAX_PAIRS = 1024


@dataclass(slots=True)
class RetryBudget:
    """A bucket over all requests. A few retries are always allowed, or a quiet router could never retry."""

    level: float = 10.0
    most: float = 100.0

    def offered(self) -> None:
        self.level = min(self.most, self.level + RETRY_SHARE)

    def take(self) -> bool:
        if self.level < 1.0:
            return False
        self.level -= 1.0
        return True


@dataclass(slots=True)
class PairHealth:
    """(P, D) pairs that have failed each other lately: the pair is shunned, not its workers."""

    shun_s: float = 10.0
    failures: int = 2
    _failed: OrderedDict[tuple[WorkerId, WorkerId], list[float]] = field(default_factory=OrderedDict)

    def failed(self, pair: tuple[WorkerId, WorkerId], now_s: float) -> None:
        recent = [at for at in self._failed.pop(pair, []) if now_s - at < self.shun_s]
        self._failed[pair] = [*recent, now_s]
        while len(self._failed) > MAX_PAIRS:
            self._failed.popitem(last=False)

    def shunned(self, now_s: float) -> frozenset[tuple[WorkerId, WorkerId]]:
        return frozenset(
            pair
            for pair, failures in self._failed.items()
            if sum(now_s - at < self.shun_s for at in failures) >= self.failures
        )
