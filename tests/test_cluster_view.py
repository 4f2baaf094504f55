"""What a router tells of its cluster: recent quantiles, workers and tiers folded from what it knows, its metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from random import Random

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from router_front import HELLO, completion, front, in_process, say, tiny_tokenizer

from core.messages import Load, Role, WorkerId, WorkerInfo
from core.registry.decisions import LIFE_S, Decision, publish
from core.registry.memory_store import MemoryShelf, MemoryStore
from core.registry.records import WorkerRecord, WorkerState
from core.registry.registry import Registry
from core.registry.routers import RouterList, RouterRecord
from router.cluster_view import MISSING, UNREACHABLE, VERSION, RegistryView, Seen, fold_pairs, fold_tiers, fold_workers
from router.cluster_watch import Announced, ClusterWatch, Identity, announced_in, nothing_announced
from router.histogram import Histogram
from router.metrics import RouterMetrics
from router.path_survey import PairPath, PathSurvey
from router.recent import HISTORY_S, MAX_NOTES, STEP_S, TICK_S, WINDOW_S, Recent, quantile
from router.scaling_board import ScalingBoard
from router.tier_metrics import TierMetrics
from router.workers import Workers

BOUNDS = (1.0, 2.0, 4.0)


def info(name: str, role: Role, incarnation: int = 1) -> WorkerInfo:
    return WorkerInfo(WorkerId(name, incarnation), role, "identity", "layout", 16, 100, 4096, "host:1")


def record(name: str, role: Role, state: WorkerState, incarnation: int = 1) -> WorkerRecord:
    return WorkerRecord(info(name, role, incarnation), "host:1", state, {"zone": "a"})


def seen(name: str, role: Role, load: Load | None = None, connected: bool = True) -> Seen:
    return Seen(info(name, role), load or Load(), connected)


class Link:
    """Takes everything and does nothing."""

    def submit(self, *_: object) -> None: ...

    cancel = lend = submit


# --- quantiles -----------------------------------------------------------------------------------------------


def test_a_quantile_lies_within_its_bucket() -> None:
    assert quantile(BOUNDS, (0, 0, 0, 0), 0.5) is None
    assert quantile(BOUNDS, (4, 0, 0, 0), 0.5) == pytest.approx(0.5)
    assert quantile(BOUNDS, (2, 2, 0, 0), 0.5) == pytest.approx(1.0)
    assert quantile(BOUNDS, (2, 2, 0, 0), 0.75) == pytest.approx(1.5)
    assert quantile(BOUNDS, (0, 0, 10, 0), 0.99) == pytest.approx(3.98)
    assert quantile(BOUNDS, (1, 0, 0, 9), 0.9) == 4.0  # above every bound: no more is known


def test_a_quantile_is_never_further_off_than_its_bucket() -> None:
    random = Random(7)
    for _ in range(200):
        values = sorted(random.uniform(0.0, 4.0) for _ in range(random.randint(1, 50)))
        counts = [sum(low < value <= high for value in values) for low, high in ((0, 1), (1, 2), (2, 4))]
        share = random.choice((0.5, 0.9, 0.99))
        true = values[max(0, -int(-share * len(values) // 1) - 1)]
        found = quantile(BOUNDS, (*counts, 0), share)
        low = max(bound for bound in (0.0, *BOUNDS) if bound < true)
        high = min(bound for bound in BOUNDS if bound >= true)
        assert found is not None and low <= found <= high


class TestRecent:
    def setup_method(self) -> None:
        self.now_s = 1000.0
        self.histogram = Histogram("x", "x", {}, BOUNDS)
        self.recent = Recent(self.histogram, lambda: self.now_s)

    def run(self, for_s: float) -> None:
        ends_s = self.now_s + for_s
        while self.now_s < ends_s:
            self.now_s += TICK_S
            self.recent.tick()

    def test_what_is_older_than_a_minute_does_not_count(self) -> None:
        self.histogram.observe(3.0)
        self.run(WINDOW_S / 2)
        spread = self.recent.spread()
        assert (spread.observed, spread.window_s) == (1, WINDOW_S / 2) and spread.p50_s == pytest.approx(3.0)
        self.run(WINDOW_S)
        assert (self.recent.spread().observed, self.recent.spread().p50_s) == (0, None)
        self.histogram.observe(0.5)
        spread = self.recent.spread()
        assert (spread.observed, spread.window_s) == (1, WINDOW_S) and spread.p99_s == pytest.approx(0.99)

    def test_the_history_has_one_value_for_each_step_and_is_bounded(self) -> None:
        assert self.recent.spread().history_p90_s == ()
        self.run(STEP_S)
        self.histogram.observe(3.0)
        self.run(STEP_S)
        self.run(STEP_S)
        assert self.recent.spread().history_p90_s == (None, pytest.approx(3.8), None)
        self.run(10 * HISTORY_S)
        assert len(self.recent.spread().history_p90_s) == HISTORY_S / STEP_S
        assert len(self.recent._notes) == MAX_NOTES

    def test_late_ticks_lose_nothing(self) -> None:
        self.histogram.observe(0.5)
        self.now_s += 1e6
        self.histogram.observe(0.5)
        assert self.recent.spread().observed == 2


# --- the view ------------------------------------------------------------------------------------------------


def test_a_workers_state_is_what_session_and_registry_say_together() -> None:
    p, d = Role.PREFILL, Role.DECODE
    records = {
        "p0": record("p0", p, WorkerState.READY),
        "p1": record("p1", p, WorkerState.DRAINING),
        "p2": record("p2", p, WorkerState.STARTING),
        "p3": record("p3", p, WorkerState.READY),
        "d2": record("d2", d, WorkerState.DRAINING, incarnation=9),
    }
    sessions = [
        seen("p0", p),
        seen("p1", p),
        seen("d0", d, Load(draining=True)),
        seen("d1", d, connected=False),
        seen("d2", d),
    ]
    workers = fold_workers(sessions, records, {"d9": "decode", "p0": "prefill", "never": ""})
    assert [(worker.name, worker.state) for worker in workers] == [
        ("p0", "ready"),
        ("p1", "draining"),
        ("p2", "starting"),
        ("p3", UNREACHABLE),
        ("d0", "draining"),
        ("d1", UNREACHABLE),
        ("d2", "ready"),  # the record is that of another incarnation
        ("d9", MISSING),
        ("never", MISSING),
    ]
    assert workers[0].labels == {"zone": "a"} and workers[4].labels == {}


def test_tiers_count_their_workers_and_show_what_was_decided() -> None:
    workers = fold_workers(
        [seen("p0", Role.PREFILL), seen("d0", Role.DECODE), seen("d1", Role.DECODE, Load(draining=True))],
        {"d2": record("d2", Role.DECODE, WorkerState.STARTING)},
        {"d3": "decode"},
    )
    decisions = {"decode": Decision("decode", 3, 1, "pages"), "router": Decision("router", 2, 1, "")}
    tiers = fold_tiers(workers, decisions, ["aggregated"], routers=1)
    assert [tier.tier for tier in tiers] == ["router", "prefill", "decode", "aggregated"]
    router, prefill, decode, aggregated = tiers
    assert (router.desired, router.ready) == (2, 1)
    assert (prefill.desired, prefill.ready, prefill.reason) == (None, 1, "")
    assert (decode.desired, decode.ready, decode.starting, decode.draining, decode.gone) == (3, 1, 1, 1, 1)
    assert decode.reason == "pages" and aggregated.ready == 0


def test_requests_are_counted_on_the_way_that_they_take() -> None:
    paths = [PairPath("p0", "d0", "shm"), PairPath("d0", "p0", needed=False), PairPath("p1", "d0")]
    pairs = fold_pairs(paths, {("p0", "d0"): 3, ("d0", "p0"): 5})
    assert [(pair.source, pair.receiver, pair.requests) for pair in pairs] == [
        ("p0", "d0", 3),
        ("d0", "p0", 0),
        ("p1", "d0", 0),
    ]


def test_attempts_are_counted_by_the_pair_that_they_run_on() -> None:
    workers = Workers(lambda: 0.0)
    prefill, decode = WorkerId("p0", 1), WorkerId("d0", 1)
    workers.open("a", 1, (decode, prefill), list)
    workers.open("b", 1, (decode, prefill), list)
    workers.open("c", 1, (decode,), list)
    assert workers.attempts_by_pair() == {("p0", "d0"): 2}
    workers.close("a")
    assert workers.attempts_by_pair() == {("p0", "d0"): 1}


# --- what the router remembers ---------------------------------------------------------------------------------


def watch_of(
    workers: Workers,
    metrics: RouterMetrics,
    names: tuple[str, ...],
    announced: Callable[[], Announced] = nothing_announced,
) -> ClusterWatch:
    return ClusterWatch(
        Identity("router", "baton-tiny", "1", names),
        workers,
        metrics,
        lambda: 0.0,
        survey=PathSurvey(tuple),
        board=ScalingBoard(None, lambda: 0.0),
        announced=announced,
    )


async def test_a_worker_that_is_gone_is_missed_where_it_was() -> None:
    workers, metrics = Workers(lambda: 0.0), RouterMetrics("baton-tiny")
    watch = watch_of(workers, metrics, ("p0", "d0"))
    workers.up(info("p0", Role.PREFILL), Link())
    workers.up(info("d0", Role.DECODE), Link())
    assert [tier.ready for tier in watch.tiers()] == [1, 1]
    workers.down(WorkerId("d0", 1))
    view = await watch.look()
    assert [(w.name, w.tier, w.state) for w in view.workers] == [
        ("p0", "prefill", "ready"),
        ("d0", "decode", "missing"),
    ]
    assert [(tier.tier, tier.ready, tier.gone) for tier in view.tiers] == [("prefill", 1, 0), ("decode", 0, 1)]
    assert 'baton:tier_workers{state="ready",tier="decode"} 0.0' in metrics.text()
    assert 'baton:tier_workers{state="ready",tier="prefill"} 1.0' in metrics.text()
    assert 'baton:tier_decisions_total{direction="up",tier="decode"} 0.0' in metrics.text()
    assert "baton:tier_desired_workers{" not in metrics.text()


async def test_the_endpoint_gives_the_view_as_json() -> None:
    tokenizer = tiny_tokenizer()
    workers = Workers(lambda: 0.0)
    workers.up(info("w0", Role.AGGREGATED), Link())
    metrics = RouterMetrics("baton-tiny")
    served = front(tokenizer, say(tokenizer, HELLO), cluster=watch_of(workers, metrics, ()).look)
    async with in_process(served) as client:
        await client.post("/v1/completions", json=completion())
        answer = await client.get("/cluster")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["version"] == VERSION and found["model"] == "baton-tiny" and found["registry"] is None
    assert [worker["name"] for worker in found["workers"]] == ["w0"]
    assert found["tiers"][0] == {
        "tier": "aggregated",
        "desired": None,
        "ready": 1,
        "starting": 0,
        "draining": 0,
        "gone": 0,
        "reason": "",
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# --- decisions -------------------------------------------------------------------------------------------------


class TestBoard:
    def setup_method(self) -> None:
        self.now_s = 0.0
        self.shelf = MemoryShelf(lambda: self.now_s)
        self.store = MemoryStore(self.shelf)
        self.board = ScalingBoard(self.store, lambda: self.now_s)

    async def decided(self, desired: int) -> None:
        await publish(self.store, Decision("decode", desired, 1, "why"))
        await self.board.read()

    async def test_changes_are_counted_by_their_direction(self) -> None:
        for desired in (1, 1, 3, 2, 1, 1, 4):
            await self.decided(desired)
        assert self.board.changes == {("decode", "up"): 2, ("decode", "down"): 2}
        registry = CollectorRegistry()
        tiers = fold_tiers((), self.board.decisions, (), 1)
        registry.register(TierMetrics(lambda: tiers, self.board, lambda: 0))
        text = generate_latest(registry).decode()
        assert 'baton:tier_desired_workers{tier="decode"} 4.0' in text
        assert 'baton:tier_decisions_total{direction="up",tier="decode"} 2.0' in text
        assert 'baton:tier_decisions_total{direction="down",tier="decode"} 2.0' in text

    async def test_a_store_that_is_away_leaves_the_last_decision_for_its_life(self) -> None:
        await self.decided(2)
        self.shelf.away = True
        self.now_s = LIFE_S - 0.1
        await self.board.read()
        assert self.board.decisions["decode"].desired == 2
        self.now_s = LIFE_S + 0.1
        await self.board.read()
        assert not self.board.decisions

    async def test_without_a_store_it_ends_at_once_and_with_one_it_goes_on(self) -> None:
        await asyncio.wait_for(ScalingBoard(None, lambda: 0.0).run(), 1)
        task = asyncio.create_task(self.board.run())
        await publish(self.store, Decision("prefill", 1, 1, ""))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done() and "prefill" in self.board.decisions
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- with a registry -------------------------------------------------------------------------------------------


async def test_with_a_registry_the_other_routers_are_named_and_its_age_is_told() -> None:
    now_s = [0.0]
    shelf = MemoryShelf(lambda: now_s[0])
    store = MemoryStore(shelf)
    registry = Registry(store, lambda: now_s[0], Random(1))
    me, other = (RouterRecord(f"{name}-1", name, f"http://{name}:8000") for name in ("r0", "r1"))
    lists = [RouterList(MemoryStore(shelf), record, Random(2)) for record in (other, me)]
    registry.announce(record("p0", Role.PREFILL, WorkerState.STARTING))

    def announced() -> Announced:
        return announced_in(registry, lists[1], lambda: now_s[0])

    assert announced().registry == RegistryView(up=True, age_s=None)
    tasks = [asyncio.create_task(loop) for loop in (registry.run(), *(one.run() for one in lists))]
    try:
        async with asyncio.timeout(10):
            while not (registry.snapshot.records and lists[1].others):
                await asyncio.sleep(0.01)
        now_s[0] += 2.5
        found = announced()
        assert found.registry == RegistryView(up=True, age_s=2.5)
        assert [(one.name, one.url, one.answers) for one in found.routers] == [("r1", "http://r1:8000", False)]
        workers, metrics = Workers(lambda: 0.0), RouterMetrics("baton-tiny")
        watch = watch_of(workers, metrics, (), announced)
        view = await watch.look()
        assert [one.name for one in view.routers] == ["router", "r1"]
        assert [(one.name, one.state) for one in view.workers] == [("p0", "starting")]
        assert 'baton:tier_workers{state="starting",tier="prefill"} 1.0' in metrics.text()
        shelf.away = True
        async with asyncio.timeout(10):
            while not registry.is_away:
                await asyncio.sleep(0.01)
        assert announced().registry == RegistryView(up=False, age_s=2.5)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_drain_is_cut_short_when_the_worker_goes_with_requests_on_it() -> None:
    workers = Workers(lambda: 0.0)
    for name in ("idle", "busy", "killed"):
        workers.up(info(name, Role.DECODE), Link())
    for number, name in enumerate(("busy", "killed")):
        workers.open(f"r{number}", 1, (WorkerId(name, 1),), list)
    for name in ("idle", "busy"):
        workers.on_load(WorkerId(name, 1), Load(draining=True))
    for name in ("idle", "killed"):
        workers.down(WorkerId(name, 1))
    assert workers.drains_cut_short == 0, "one had nothing left, the other was not draining"
    workers.down(WorkerId("busy", 1))
    assert workers.drains_cut_short == 1
