"""What is wrong with a cluster, in words, and what to do next. Pure.

`wrong` costs requests or time now, or will soon; a hint is worth knowing, and nothing has to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from baton.doctor_judgement import Finding, merged
from baton.doctor_judgement import judge as judge_paths
from core.messages import Role
from core.registry.records import WorkerState
from router.cluster_view import MISSING, ROUTER_TIER, UNREACHABLE, ClusterView, TierView, WorkerView
from router.path_survey import PairPath, PathReply

FULL_SHARE = 0.95  # of a pool: what is above it is as good as full
LONG_WAIT_S = 10.0  # that prompts stand in the queues of a tier
READY, STARTING, DRAINING = WorkerState.READY.value, WorkerState.STARTING.value, WorkerState.DRAINING.value
SLOW_ADVICE = "measured once, perhaps in a busy moment: `baton doctor transport` measures anew"
HELD = ("owned", "leased", "quarantined")  # pages that cannot be had for the asking

GONE_ADVICE = {
    MISSING: "see its log for why it ended; `baton serve` starts it again, elsewhere whoever started it has to",
    UNREACHABLE: "see that it runs, and that this router reaches its address; its requests go to others meanwhile",
}


def judge(view: ClusterView) -> list[Finding]:
    """What is wrong first; what several have in common is said once."""
    parts: tuple[Callable[[ClusterView], Iterable[Finding]], ...] = (
        _service, _registry, _gone, _tiers, _pools, _queues, _models, _paths, _draining,
    )  # fmt: skip
    found = merged([finding for part in parts for finding in part(view)])
    return sorted(found, key=lambda finding: not finding.wrong)


def held_share(worker: WorkerView) -> float:
    """Of the pool, what somebody holds; 0 when nothing is known."""
    total = sum(worker.pages.values())
    return sum(worker.pages.get(state, 0) for state in HELD) / total if total else 0.0


def _service(view: ClusterView) -> Iterable[Finding]:
    able = {worker.tier for worker in view.workers if worker.state == READY}
    if Role.AGGREGATED.value in able:
        return
    if not able & {Role.PREFILL.value, Role.DECODE.value}:
        yield Finding(True, (), "no worker is ready: no request can be answered", "start workers, or wait for them")
        return
    for role in (Role.PREFILL.value, Role.DECODE.value):
        if role not in able:
            what = f"no {role} worker is ready: requests that need one wait, and end in 503"
            yield Finding(True, (), what, f"see why the {role} tier has none; its workers and logs say it")


def _registry(view: ClusterView) -> Iterable[Finding]:
    if view.registry is None or view.registry.up:
        return
    age = "was never read" if view.registry.age_s is None else f"was last read {view.registry.age_s:.0f} s ago"
    what = f"is away, and {age}: serving goes on with the workers that are known, and new ones are not seen"
    yield Finding(True, ("registry",), what, "see that Redis runs, and that its address and password are right")


def _gone(view: ClusterView) -> Iterable[Finding]:
    for worker in view.workers:
        if worker.state in GONE_ADVICE:
            what = "has gone" if worker.state == MISSING else "has no session with this router"
            yield Finding(True, (worker.name,), what, GONE_ADVICE[worker.state])


def _tiers(view: ClusterView) -> Iterable[Finding]:
    for tier in view.tiers:
        if tier.desired is not None and tier.ready < tier.desired and tier.tier != ROUTER_TIER:
            yield _too_few(tier, tier.desired)


def _too_few(tier: TierView, desired: int) -> Finding:
    what = f"has {tier.ready} of {desired} workers ready"
    if tier.ready + tier.starting >= desired:
        return Finding(False, (tier.tier,), f"{what}, and the rest is starting", "nothing to do: they load the model")
    advice = "see what they wait for where they are placed: `ray status`, or the pending pods; often a GPU or memory"
    return Finding(True, (tier.tier,), what, advice)


def _pools(view: ClusterView) -> Iterable[Finding]:
    for worker in view.workers:
        if held_share(worker) >= FULL_SHARE:
            advice = "add workers to its tier, or give them more pages (--kv-bytes); requests wait for pages meanwhile"
            yield Finding(True, (worker.name,), "its page pool is full", advice)


def _queues(view: ClusterView) -> Iterable[Finding]:
    for tier in (Role.PREFILL.value, Role.AGGREGATED.value):
        ready = [worker for worker in view.workers if worker.tier == tier and worker.state == READY]
        rate = sum(worker.prefill_tokens_per_s for worker in ready)
        waiting = sum(worker.waiting_tokens for worker in ready)
        if rate and waiting / rate > LONG_WAIT_S:
            what = f"{waiting} prompt tokens wait, about {waiting / rate:.0f} s of work"
            yield Finding(True, (tier,), what, f"add {tier} workers, or send less")


def _models(view: ClusterView) -> Iterable[Finding]:
    by_model: dict[str, list[str]] = {}
    for worker in view.workers:
        if worker.identity:
            by_model.setdefault(worker.identity, []).append(worker.name)
    if len(by_model) > 1:
        fewest = min(by_model.values(), key=len)
        what = "serves another model than the rest, and can never be paired with them"
        yield Finding(True, tuple(fewest), what, "start it with the same checkpoint, or in a cluster of its own")


def _paths(view: ClusterView) -> Iterable[Finding]:
    """Of the paths that are in use: those that nobody has needed yet are not proved, and not wrong."""
    up = {worker.name for worker in view.workers if worker.state not in GONE_ADVICE}
    used = tuple(
        PairPath(
            pair.source,
            pair.receiver,
            transport=pair.transport,
            lanes=pair.lanes,
            bytes_per_s=pair.bytes_per_s,
            latency_s=pair.latency_s,
            trouble=pair.trouble,
            needed=pair.needed,
        )
        for pair in view.handoffs
        if (pair.transport or pair.trouble) and {pair.source, pair.receiver} <= up
    )
    broken, sound = [path for path in used if path.trouble], [path for path in used if not path.trouble]
    yield from judge_paths(PathReply(tuple(broken))) if broken else ()
    for finding in judge_paths(PathReply(tuple(sound))) if sound else ():
        yield replace(finding, wrong=False, advice=SLOW_ADVICE) if finding.wrong else finding


def _draining(view: ClusterView) -> Iterable[Finding]:
    for worker in view.workers:
        if worker.state == DRAINING:
            left = f"{worker.running_requests + worker.waiting_requests} requests left"
            yield Finding(False, (worker.name,), f"is draining, {left}", "nothing to do: it ends by itself")
