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


Pair = tuple[WorkerId, WorkerId]


@dataclass(slots=True)
class _Record:
    """What is known of a pair that has failed lately."""

    failed_s: list[float] = field(default_factory=list)  # lately
    strikes: int = 0  # how often it was shunned since it last worked
    until_s: float = 0.0  # it is shunned
    trial_s: float | None = None  # the beginning of the one request that may try it


@dataclass(slots=True)
class PairHealth:
    """(P, D) pairs that have failed each other lately: the pair is shunned, not its workers.

    healthy --fails twice within shun_s--> shunned --its time is over--> one request tries it
       ^                                      ^                             |
       `--it works ---------------------------|-----------------------------+
                                              `--it fails: twice as long ---'
    """

    shun_s: float = 10.0
    longest_s: float = 80.0
    trial_s: float = 30.0  # a trial that has not ended by then is forgotten, and another may begin
    failures: int = 2
    _records: OrderedDict[Pair, _Record] = field(default_factory=OrderedDict)

    def failed(self, pair: Pair, now_s: float) -> None:
        record = self._records.pop(pair, None) or _Record()
        self._records[pair] = record
        record.failed_s = [at for at in record.failed_s if now_s - at < self.shun_s] + [now_s]
        if record.strikes and now_s < record.until_s:
            return  # a request that was on its way before, or that had no other pair
        if record.strikes or len(record.failed_s) >= self.failures:
            record.strikes += 1
            record.until_s = now_s + min(self.longest_s, self.shun_s * 2 ** (record.strikes - 1))
            record.trial_s = None
            record.failed_s.clear()
        while len(self._records) > MAX_PAIRS:
            self._records.popitem(last=False)

    def worked(self, pair: Pair) -> None:
        """A hand-off between them was committed: they are as good as any pair."""
        record = self._records.get(pair)
        if record is not None and record.strikes:
            del self._records[pair]

    def tried(self, pair: Pair, now_s: float) -> None:
        """A request was placed on it. If its time is over, this is the trial, and others keep away meanwhile."""
        record = self._records.get(pair)
        if record is not None and record.strikes and record.until_s <= now_s:
            record.trial_s = now_s

    def shunned(self, now_s: float) -> frozenset[Pair]:
        return frozenset(pair for pair, record in self._records.items() if self._is_shunned(record, now_s))

    def _is_shunned(self, record: _Record, now_s: float) -> bool:
        on_trial = record.trial_s is not None and now_s - record.trial_s < self.trial_s
        return record.strikes > 0 and (now_s < record.until_s or on_trial)
