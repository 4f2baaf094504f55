"""What one router shares with the others through the registry: its address, its parts of the limits, lost workers."""

from __future__ import annotations

import secrets
from collections.abc import Coroutine
from random import Random
from typing import Any

from baton.registry_link import RegistryLink
from core.clock import Clock
from core.registry.poison import PoisonCounts
from core.registry.quota import Quota
from core.registry.routers import RouterList, RouterRecord
from router.admission import Parts
from router.cluster_watch import Announced, announced_in
from router.limits import Limits


class RouterShare:
    """`loops` keep it, each until it is cancelled."""

    def __init__(self, link: RegistryLink, me: RouterRecord, limits: Limits, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self.poison = PoisonCounts(link.store, clock)
        self._routers = RouterList(link.store, me, _random())
        self._requests = self._quota("requests", me.router, limits.max_requests)
        self._tokens = self._quota("queued_tokens", me.router, limits.max_queued_tokens)
        self.parts = Parts(self._requests, self._tokens)

    def _quota(self, name: str, router: str, limit: int) -> Quota:
        return Quota(self._link.store, self._clock, _random(), name=name, router=router, limit=limit)

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """By name."""
        return {
            "registry": self._link.registry.run(),
            "routers": self._routers.run(),
            "poison": self.poison.run(),
            "part of the requests": self._requests.run(),
            "part of the queued tokens": self._tokens.run(),
        }

    def announced(self) -> Announced:
        """For the view of the cluster."""
        return announced_in(self._link.registry, self._routers, self._clock)


def _random() -> Random:
    return Random(secrets.randbits(64))
