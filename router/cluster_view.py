"""The cluster as one router sees it: what `GET /cluster` says. Pure: `fold` makes it of what the router knows.

The shape has a version, which changes when a field changes its meaning or goes; fields may be added without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from core.messages import Load, Role, WorkerInfo
from core.registry.decisions import Decision
from core.registry.records import WorkerRecord, WorkerState
from router.path_survey import PairPath
from router.recent import NOTHING_OBSERVED, Spread

VERSION = 1
ROUTER_TIER = "router"
UNREACHABLE = "unreachable"  # it is announced, or was there, and this router has no open session with it
MISSING = "missing"  # it is configured by name, and was not there since it ended, or ever
STATES = (*(state.value for state in WorkerState), UNREACHABLE, MISSING)


@dataclass(frozen=True, slots=True)
class RouterView:
    """`url` is empty for one that publishes none. Only the router that answers tells its own load."""

    name: str
    url: str = ""
    answers: bool = False  # it is the one that gives this view
    inflight_requests: int = 0  # choices admitted and not ended
    queued_prompt_tokens: int = 0  # of prompts without a first token


@dataclass(frozen=True, slots=True)
class TierView:
    """Workers of one role. `desired` is None, and `reason` empty, where nobody decides on it."""

    tier: str
    desired: int | None
    ready: int
    starting: int
    draining: int
    gone: int  # unreachable or missing
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker with its last reported load. Everything but name and state is empty for one that is missing."""

    name: str
    tier: str
    state: str  # one of STATES
    identity: str = ""  # of the model: equal for all workers
    labels: dict[str, str] = field(default_factory=dict)
    waiting_requests: int = 0
    waiting_tokens: int = 0  # prompt tokens not computed yet
    running_requests: int = 0
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0  # recent mean
    pages_total: int = 0
    pages: dict[str, int] = field(default_factory=dict)  # by the state of their strongest holder
    handoffs: dict[str, int] = field(default_factory=dict)  # under way at this worker, by state


@dataclass(frozen=True, slots=True)
class PairView:
    """How pages come from one worker to another. An empty transport: never used yet, or none."""

    source: str
    receiver: str
    transport: str
    lanes: str
    bytes_per_s: float
    latency_s: float
    trouble: str
    needed: bool  # requests go this way; else only loans
    requests: int  # under way on this pair, from this router


@dataclass(frozen=True, slots=True)
class RegistryView:
    up: bool
    age_s: float | None  # of the snapshot; None: never read yet


@dataclass(frozen=True, slots=True)
class ClusterView:
    """`registry` is None in a cluster without one."""

    model: str
    baton_version: str
    routers: tuple[RouterView, ...]
    tiers: tuple[TierView, ...]
    workers: tuple[WorkerView, ...]
    handoffs: tuple[PairView, ...]
    first_token: Spread = NOTHING_OBSERVED
    token_gap: Spread = NOTHING_OBSERVED
    registry: RegistryView | None = None
    version: int = VERSION

    def plain(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker that this router has, or had, a session with."""

    info: WorkerInfo
    load: Load
    connected: bool


def fold_workers(
    seen: Iterable[Seen], records: Mapping[str, WorkerRecord], gone: Mapping[str, str]
) -> tuple[WorkerView, ...]:
    """Sorted by tier and name. `gone`: tier by name of the configured workers, for those that are not seen."""
    found = {one.info.worker.name: _of_session(one, records.get(one.info.worker.name)) for one in seen}
    for name, record in records.items():
        found.setdefault(name, _of_record(record))
    for name, tier in gone.items():
        found.setdefault(name, WorkerView(name, tier, MISSING))
    return tuple(sorted(found.values(), key=lambda worker: (_rank(worker.tier), worker.name)))


def fold_tiers(
    workers: Sequence[WorkerView], decisions: Mapping[str, Decision], always: Iterable[str], routers: int
) -> tuple[TierView, ...]:
    """One for each tier that has workers or a decision, or is named in `always`; routers, of which only those that
    are announced are known, when somebody decides on them."""
    names = {worker.tier for worker in workers if worker.tier} | set(decisions) | set(always)
    tiers = []
    for name in sorted(names, key=_rank):
        states = [worker.state for worker in workers if worker.tier == name]
        decision = decisions.get(name)
        tiers.append(
            TierView(
                tier=name,
                desired=decision.desired if decision else None,
                ready=routers if name == ROUTER_TIER else states.count(WorkerState.READY.value),
                starting=states.count(WorkerState.STARTING.value),
                draining=states.count(WorkerState.DRAINING.value),
                gone=states.count(UNREACHABLE) + states.count(MISSING),
                reason=decision.reason if decision else "",
            )
        )
    return tuple(tiers)


def fold_pairs(paths: Iterable[PairPath], requests: Mapping[tuple[str, str], int]) -> tuple[PairView, ...]:
    return tuple(
        PairView(
            source=path.source,
            receiver=path.receiver,
            transport=path.transport,
            lanes=path.lanes,
            bytes_per_s=path.bytes_per_s,
            latency_s=path.latency_s,
            trouble=path.trouble,
            needed=path.needed,
            requests=requests.get((path.source, path.receiver), 0) if path.needed else 0,
        )
        for path in paths
    )


def _of_session(seen: Seen, record: WorkerRecord | None) -> WorkerView:
    info, load = seen.info, seen.load
    return WorkerView(
        name=info.worker.name,
        tier=info.role.value,
        state=_state(seen, record),
        identity=info.identity,
        labels=dict(record.labels) if record else {},
        waiting_requests=load.waiting_requests,
        waiting_tokens=load.waiting_tokens,
        running_requests=load.running_requests,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        step_s=load.step_s,
        pages_total=info.pages_total,
        pages=dict(load.pages),
        handoffs=dict(load.handoffs),
    )


def _state(seen: Seen, record: WorkerRecord | None) -> str:
    """Draining is believed from whoever says it first; a session says better than the registry who lives."""
    if not seen.connected:
        return UNREACHABLE
    same = record if record is not None and record.worker == seen.info.worker else None
    if seen.load.draining or (same is not None and same.state is WorkerState.DRAINING):
        return WorkerState.DRAINING.value
    return WorkerState.STARTING.value if same and same.state is WorkerState.STARTING else WorkerState.READY.value


def _of_record(record: WorkerRecord) -> WorkerView:
    state = UNREACHABLE if record.state is WorkerState.READY else record.state.value
    info = record.info
    return WorkerView(
        name=record.worker.name,
        tier=info.role.value,
        state=state,
        identity=info.identity,
        labels=dict(record.labels),
        pages_total=info.pages_total,
    )


def _rank(tier: str) -> tuple[int, str]:
    """Routers first, then the tiers in the order in which a request meets them."""
    order = (ROUTER_TIER, *(role.value for role in Role))
    return (order.index(tier) if tier in order else len(order), tier)
