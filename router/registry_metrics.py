"""What a router says of its registry: whether it answers, how old the view of the cluster is, what became of calls.

A router without a registry has none of these.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from core.clock import Clock
from core.registry.breaker import OUTCOMES, GuardedStore
from core.registry.registry import Registry

NEVER_S = 1e9  # shown for the age of a view that was never read


def show_registry(metrics: CollectorRegistry, store: GuardedStore, registry: Registry, clock: Clock) -> None:
    """Adds them to a router's metrics, and counts the store's calls from now on."""
    Gauge("baton:registry_up", "Whether the registry answers.", registry=metrics).set_function(
        lambda: 0.0 if registry.is_away or registry.snapshot.read_s is None else 1.0
    )
    Gauge(
        "baton:cluster_view_age_seconds", "Time since the workers were read from the registry.", registry=metrics
    ).set_function(lambda: min(NEVER_S, registry.snapshot.age_s(clock())))
    calls = Counter("baton:registry_calls", "Calls of the registry by outcome.", ["outcome"], registry=metrics)
    by_outcome = {outcome: calls.labels(outcome) for outcome in OUTCOMES}
    store.on_call = lambda outcome: by_outcome[outcome].inc()
