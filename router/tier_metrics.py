"""The router's metrics of tiers: the workers of each by state, how many are desired, how often that changed.

All of it is read when a page is asked for. Every router of a cluster shows the same workers and decisions: take the
maximum over routers, never the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.cluster_view import TierView
from router.scaling_board import DIRECTIONS, ScalingBoard


class TierMetrics(Collector):
    """`tiers` is asked at each scrape."""

    def __init__(
        self, tiers: Callable[[], Sequence[TierView]], board: ScalingBoard, cut_short: Callable[[], int]
    ) -> None:
        self._tiers = tiers
        self._board = board
        self._cut_short = cut_short

    def collect(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("baton:tier_workers", "Workers of a tier, by state.", labels=["tier", "state"])
        desired = GaugeMetricFamily(
            "baton:tier_desired_workers", "Workers that scaling has decided on.", labels=["tier"]
        )
        changes = CounterMetricFamily(
            "baton:tier_decisions", "Times that the desired number changed.", labels=["tier", "direction"]
        )
        for tier in self._tiers():
            for state, count in (("starting", tier.starting), ("ready", tier.ready), ("draining", tier.draining)):
                workers.add_metric([tier.tier, state], count)
            if tier.desired is not None:
                desired.add_metric([tier.tier], tier.desired)
            for direction in DIRECTIONS:
                changes.add_metric([tier.tier, direction], self._board.changes.get((tier.tier, direction), 0))
        cut_short = CounterMetricFamily(
            "baton:drains_cut_short", "Workers that went while they drained, with requests still on them."
        )
        cut_short.add_metric([], self._cut_short())
        yield from (workers, desired, changes, cut_short)
