"""The autoscaling policies that Serve's controller calls: thin, and never waiting for anything.

Ray copies this module by value into its controller, so nothing is decided here: baton/cluster/deciding.py is.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from ray.util.metrics import Gauge

from baton.cluster.deciding import NeedOf, Numbers, TierSize, need_of_decode, need_of_prefill, need_of_routers
from baton.cluster.publishing import DecisionPublisher
from baton.cluster.reading import read
from baton.cluster.spec import RegistrySpec, RouterTarget
from baton.scaling.decode import DecodeTarget
from baton.scaling.prefill import PrefillTarget
from baton.scaling.steady import Bounds
from core.registry.decisions import Decision
from core.registry.store import Store


class TierPolicy:
    """One tier's. Called with Serve's context; the answer is how many replicas there should be."""

    def __init__(self, target: dict[str, Any], bounds: dict[str, Any], registry: dict[str, Any]) -> None:
        self._size = TierSize(self.need_of(target), read(Bounds, bounds, "bounds"))
        at = read(RegistrySpec, registry, "registry")
        self._publisher = DecisionPublisher(lambda: open_store_of(at))
        weakref.finalize(self, self._publisher.close)  # a newer policy takes this one's place
        tags = ("tier",)
        self._desired = Gauge("baton_tier_desired_workers", "How many workers the tier should have.", tag_keys=tags)
        self._ready = Gauge("baton_tier_ready_workers", "How many workers say that they are ready.", tag_keys=tags)
        self._last = -1

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's signature: the number, and a state, which is kept here instead."""
        tier = context.deployment_name
        decision = self._size.desired(newest(context), context.target_num_replicas, context.current_time)
        ready = min(self._size.ready, context.current_num_replicas)
        self._publisher.say(Decision(tier, decision.desired, ready, decision.reason))
        self._desired.set(decision.desired, tags={"tier": tier})
        self._ready.set(ready, tags={"tier": tier})
        if decision.desired != self._last:
            log = logging.getLogger("ray.serve")  # the controller's
            log.info("%s: %d workers desired, %d ready: %s", tier, decision.desired, ready, decision.reason)
            self._last = decision.desired
        return decision.desired, {}

    def need_of(self, target: dict[str, Any]) -> NeedOf:
        raise NotImplementedError


class PrefillTierPolicy(TierPolicy):
    def need_of(self, target: dict[str, Any]) -> NeedOf:
        return need_of_prefill(read(PrefillTarget, target, "target"))


class DecodeTierPolicy(TierPolicy):
    def need_of(self, target: dict[str, Any]) -> NeedOf:
        return need_of_decode(read(DecodeTarget, target, "target"))


class RouterTierPolicy(TierPolicy):
    def need_of(self, target: dict[str, Any]) -> NeedOf:
        return need_of_routers(read(RouterTarget, target, "target"))


def newest(context: Any) -> list[Numbers]:
    """The last value of each signal, by replica, of those that run."""
    by_replica: dict[str, dict[str, float]] = {}
    running = {str(replica) for replica in context.running_replicas}
    for name, series in (context.raw_metrics or {}).items():
        for replica, values in series.items():
            if str(replica) in running and len(values):
                by_replica.setdefault(str(replica), {})[name] = float(values[-1].value)
    return list(by_replica.values())


def open_store_of(registry: RegistrySpec) -> Store:
    """Raises ConfigError."""
    from core.registry.redis_store import open_store

    return open_store(registry.address(), registry.prefix)
