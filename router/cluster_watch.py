"""What one router remembers in order to tell of its cluster: latencies of the last minutes, tiers that were there.

`run` keeps it; `look` makes the view that `GET /cluster` gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from core.clock import Clock
from core.messages import Role
from core.registry.records import WorkerRecord
from core.registry.registry import Registry
from core.registry.routers import RouterList
from router.cluster_view import (
    ClusterView,
    RegistryView,
    RouterView,
    Seen,
    TierView,
    WorkerView,
    fold_pairs,
    fold_tiers,
    fold_workers,
)
from router.metrics import RouterMetrics
from router.path_survey import PathReply, PathSurvey
from router.recent import TICK_S, Recent
from router.scaling_board import ScalingBoard
from router.tier_metrics import TierMetrics
from router.workers import Workers

PATHS_S = 2.0  # a worker that does not tell its paths by then does not hold up the view


@dataclass(frozen=True, slots=True)
class Announced:
    """What the registry says at the moment."""

    registry: RegistryView | None = None  # None: there is no registry
    records: Mapping[str, WorkerRecord] = field(default_factory=dict)
    routers: Sequence[RouterView] = ()  # the others


def nothing_announced() -> Announced:
    return Announced()


def announced_in(registry: Registry, routers: RouterList, clock: Clock) -> Announced:
    """As last read: the store is not asked."""
    age_s = registry.snapshot.age_s(clock())
    return Announced(
        RegistryView(up=not registry.is_away, age_s=None if age_s == float("inf") else age_s),
        registry.snapshot.records,
        [RouterView(one.name, one.address) for one in routers.others],
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """Of the router that looks."""

    name: str
    model: str
    version: str
    workers: Sequence[str] = ()  # those that are configured by name


class ClusterWatch:
    """Owned by the router's event loop. Adds its metrics to the router's."""

    def __init__(
        self,
        identity: Identity,
        workers: Workers,
        metrics: RouterMetrics,
        clock: Clock,
        *,
        survey: PathSurvey,
        board: ScalingBoard,
        announced: Callable[[], Announced] = nothing_announced,
    ) -> None:
        self._identity = identity
        self._workers = workers
        self._metrics = metrics
        self._survey = survey
        self._board = board
        self._announced = announced
        self._first_token = Recent(metrics.time_to_first_token, clock)
        self._token_gap = Recent(metrics.inter_token, clock)
        self._tier_of: dict[str, str] = {}  # of configured workers, once they were there
        self._roles: set[Role] = set()
        metrics.registry.register(TierMetrics(self.tiers, board, lambda: workers.drains_cut_short))

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._board.run())
            group.create_task(self._keep_ticking())

    async def _keep_ticking(self) -> None:
        while True:
            self._first_token.tick()
            self._token_gap.tick()
            self._remember()
            await asyncio.sleep(TICK_S)

    async def look(self) -> ClusterView:
        """The cluster now."""
        paths = await self._paths()
        announced = self._announced()
        workers = self._seen(announced)
        requests, queued_tokens = self._metrics.admitted
        me = RouterView(
            self._identity.name, answers=True, inflight_requests=requests, queued_prompt_tokens=queued_tokens
        )
        return ClusterView(
            model=self._identity.model,
            baton_version=self._identity.version,
            routers=(me, *announced.routers),
            tiers=self._fold_tiers(workers, announced),
            workers=workers,
            handoffs=fold_pairs(paths.pairs, self._workers.attempts_by_pair()),
            first_token=self._first_token.spread(),
            token_gap=self._token_gap.spread(),
            registry=announced.registry,
        )

    def tiers(self) -> tuple[TierView, ...]:
        """Without asking anybody."""
        announced = self._announced()
        return self._fold_tiers(self._seen(announced), announced)

    async def _paths(self) -> PathReply:
        try:
            async with asyncio.timeout(PATHS_S):
                return await self._survey.known()
        except TimeoutError:
            return PathReply()

    def _seen(self, announced: Announced) -> tuple[WorkerView, ...]:
        self._remember()
        seen = [Seen(info, load, self._workers.reaches(info.worker)) for info, load in self._workers.infos()]
        gone = {name: self._tier_of.get(name, "") for name in self._identity.workers}
        return fold_workers(seen, announced.records, gone)

    def _fold_tiers(self, workers: Sequence[WorkerView], announced: Announced) -> tuple[TierView, ...]:
        always = [role.value for role in self._roles]  # one that has lost its last worker shows a nought, not a gap
        return fold_tiers(workers, self._board.decisions, always, 1 + len(announced.routers))

    def _remember(self) -> None:
        for info, _ in self._workers.infos():
            self._roles.add(info.role)
            if info.worker.name in self._identity.workers:
                self._tier_of[info.worker.name] = info.role.value
