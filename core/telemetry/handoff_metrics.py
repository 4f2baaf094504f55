"""A worker's metrics of hand-offs. A worker has two ends: what it gives away is told from what it takes in.

The pages of requests go from source to receiver; a loan, which only fills a cache, goes from lender to borrower.

Every hand-off is counted at both of its ends: sum one `end` over the workers, never both.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.messages import Receipt
from core.telemetry.pair_metrics import TAKING_ENDS, PairMetrics

ENDS = ("source", "receiver", "lender", "borrower")
OPEN_STATES = ("queued", "granted", "streaming", "sealed")
OUTCOMES = ("committed", "aborted")
STATE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)
EXPOSED_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class HandoffMetrics:
    """The series of one worker. `ends` names those that it has."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry = registry
        self._labels = labels
        self.in_flight = self._gauge("baton:handoffs_in_flight", "Hand-offs under way, by state", "end", "state")
        self.ended = self._counter("baton:handoffs", "Hand-offs that have ended, at this end", "end", "outcome")
        self.moved_pages = self._counter("baton:handoff_pages", "Pages handed over, or taken in, and verified", "end")
        self.pairs = PairMetrics(registry, labels)
        self.expired = self._counter("baton:handoff_deadlines", "Deadlines that passed, by state", "end", "state")
        self.state_s = self._histogram(
            "baton:handoff_state_seconds", "How long a hand-off was in a state", STATE_BUCKETS_S, "end", "state"
        )
        self._exposed_s = self._histogram(
            "baton:exposed_transfer_seconds", "From seal to commit: what compute did not hide", EXPOSED_BUCKETS_S
        ).labels(**labels)
        self._transfer_s = self._histogram(
            "baton:transfer_seconds", "How long bytes of a hand-off were under way", STATE_BUCKETS_S
        ).labels(**labels)
        self._overlap = self._histogram(
            "baton:transfer_overlap_ratio", "Share of a hand-off's bytes that compute hid", SHARE_BUCKETS
        ).labels(**labels)
        self._bytes = self._counter("baton:transferred_bytes", "Bytes of the pages that were taken in").labels(**labels)
        self._hidden = self._counter("baton:hidden_bytes", "Of these, verified before the seal").labels(**labels)
        self._reclaim_s = self._histogram(
            "baton:cancel_to_reclaim_seconds", "From a cancel until all its pages are reusable", STATE_BUCKETS_S
        ).labels(**labels)

    def end(self, name: str) -> EndMetrics:
        """What one end counts."""
        assert name in ENDS, name
        return EndMetrics(self, self._labels, name)

    def taken(self, receipt: Receipt) -> None:
        """A prompt was taken in whole, and this is what it cost."""
        self._exposed_s.observe(receipt.exposed_transfer_s)
        self._transfer_s.observe(receipt.transfer_s)
        self._bytes.inc(receipt.transferred_bytes)
        self._hidden.inc(receipt.hidden_bytes)
        if receipt.overlap is not None:
            self._overlap.observe(receipt.overlap)

    def reclaimed(self, reclaim_s: float) -> None:
        """Nothing holds back a page of a cancelled attempt any more."""
        self._reclaim_s.observe(reclaim_s)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, (*self._labels, *labels), registry=self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, (*self._labels, *labels), registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, what, (*self._labels, *labels), buckets=buckets, registry=self._registry)


class EndMetrics:
    """Series that are there from the start: a dashboard shows a zero, not a gap."""

    def __init__(self, metrics: HandoffMetrics, labels: dict[str, str], end: str) -> None:
        where = {**labels, "end": end}
        self._pairs = metrics.pairs
        self._name = end
        self._pages = metrics.moved_pages.labels(**where)
        self._outcomes = {outcome: metrics.ended.labels(**where, outcome=outcome) for outcome in OUTCOMES}
        self._in_flight = {state: metrics.in_flight.labels(**where, state=state) for state in OPEN_STATES}
        self._lasted_s = {state: metrics.state_s.labels(**where, state=state) for state in OPEN_STATES}
        self._expired = {state: metrics.expired.labels(**where, state=state) for state in (*OPEN_STATES, *OUTCOMES)}

    def met(self, peer: str) -> None:
        """A hand-off with this peer begins."""
        if self._name in TAKING_ENDS:
            self._pairs.met(self._name, peer)

    def ended(self, peer: str, outcome: str, code: str) -> None:
        """`code` is that of the error that ended it, or empty."""
        self._outcomes[outcome].inc()
        if self._name in TAKING_ENDS:
            self._pairs.ended(self._name, peer, code)

    def pages(self, count: int) -> None:
        self._pages.inc(count)

    def moved(self, old: str | None, new: str, lasted_s: float) -> None:
        """A hand-off went on, after `lasted_s` in its old state. None: it is new."""
        if old is not None:
            self._in_flight[old].dec()
            self._lasted_s[old].observe(lasted_s)
        if new in self._in_flight:
            self._in_flight[new].inc()

    def expired(self, state: str) -> None:
        """Nothing came in time. Of a state that ended the hand-off: the other end never confirmed it."""
        self._expired[state].inc()

    def fault(self, peer: str, code: str) -> None:
        self._pairs.fault(peer, code)
