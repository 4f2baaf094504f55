"""A worker's sessions with routers: order, resumption after a break, bounds; then the same over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from core.clock import monotonic_s
from core.errors import BadTicket, EngineError, InvalidRequest, WorkerLost
from core.messages import (
    Cancel,
    FinishReason,
    Lend,
    Load,
    PagesChanged,
    PathReport,
    Peer,
    Receipt,
    RequestFailed,
    Role,
    Submit,
    Token,
    Tokens,
    WorkerId,
    WorkerInfo,
)
from core.sampling import SamplingParams
from core.security.channels import Channels
from router.client import SessionTimes, Visitor, WorkerClient
from router.workers import Lost, Workers
from session.desk import Desk
from session.feed import HEARTBEAT_S, MAX_PENDING, Feed
from session.outlet import Outlet
from session.server import SERVER_OPTIONS, WorkerServicer, add_worker_service

INFO = WorkerInfo(WorkerId("d0", 7), Role.DECODE, "model", "layout", 16, 100, 4096, "unix:/nowhere")


def token(index: int, finish: FinishReason | None = None) -> Tokens:
    return Tokens("r", 1, (Token(0, index, 100 + index, finish=finish),))


class ScriptedTier:
    """Records what it is told; says what the test puts into its outlet."""

    def __init__(self, info: WorkerInfo = INFO) -> None:
        self.info = info
        self.submitted: list[Submit] = []
        self.cancelled: list[Cancel] = []
        self.lent: list[Lend] = []
        self.refuses: InvalidRequest | None = None
        self.stuck = False
        self.changes: list[PagesChanged] = []
        self.load_now = Load(pages={"free": 99})

    def submit(self, submit: Submit) -> None:
        if self.refuses:
            raise self.refuses
        self.submitted.append(submit)

    def cancel(self, cancel: Cancel) -> None:
        self.cancelled.append(cancel)

    def lend(self, lend: Lend) -> None:
        self.lent.append(lend)

    def load(self) -> Load:
        return self.load_now

    def page_changes(self) -> PagesChanged | None:
        return self.changes.pop(0) if self.changes else None

    def page_snapshot(self) -> PagesChanged:
        return PagesChanged(0, (b"a" * 16,), (), snapshot=True)

    async def turn(self) -> float:
        if self.stuck:
            raise EngineError("the loop is stuck")
        return 0.001


class TestOutlet:
    def setup_method(self) -> None:
        self.now_s = 0.0
        self.outlet = Outlet(lambda: self.now_s, queue_messages=4, grace_s=5.0, linger_s=10.0)

    def drain(self, queue) -> list[object]:  # type: ignore[no-untyped-def]
        return [queue.messages.get_nowait() for _ in range(queue.messages.qsize())]

    async def test_one_message_per_step_and_router(self) -> None:
        queue, _ = self.outlet.open("a", {})
        other, _ = self.outlet.open("b", {})
        for name, router in (("r", "a"), ("s", "a"), ("t", "b")):
            assert self.outlet.hold(router, (name, 1))
        self.outlet.send([Tokens(name, 1, (Token(0, 0, 1),)) for name in "rst"])
        assert [len(batch.items) for batch in self.drain(queue)] == [2]  # type: ignore[attr-defined]
        assert [len(batch.items) for batch in self.drain(other)] == [1]  # type: ignore[attr-defined]

    async def test_a_resumed_session_gets_what_it_lacks_and_no_more(self) -> None:
        queue, _ = self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        for index in range(3):
            self.outlet.send([token(index)])
        self.outlet.close("a", queue)
        self.outlet.send([token(3)])
        again, dropped = self.outlet.open("a", {("r", 1): (2,)})
        assert dropped == []
        (batch,) = self.drain(again)
        assert [t.index for item in batch.items for t in item.tokens] == [2, 3]  # type: ignore[attr-defined]

    async def test_what_the_router_no_longer_runs_is_dropped_and_what_we_do_not_know_has_failed(self) -> None:
        self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        again, dropped = self.outlet.open("a", {("unknown", 2): (0,)})
        assert dropped == [("r", 1)]
        (failed,) = self.drain(again)
        assert (failed.request_id, failed.code) == ("unknown", "worker_lost")  # type: ignore[attr-defined]

    async def test_another_routers_request_is_not_told(self) -> None:
        self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        self.outlet.send([token(0)])
        other, dropped = self.outlet.open("b", {("r", 1): (0,)})
        assert dropped == []
        (failed,) = self.drain(other)
        assert (failed.request_id, failed.code) == ("r", "worker_lost")  # type: ignore[attr-defined]

    async def test_a_full_queue_ends_the_session_and_loses_nothing(self) -> None:
        queue, _ = self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        for index in range(5):
            self.outlet.send([token(index)])
        assert self.drain(queue) == [None]
        again, _ = self.outlet.open("a", {("r", 1): (0,)})
        (batch,) = self.drain(again)
        assert [t.index for item in batch.items for t in item.tokens] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]

    async def test_more_to_resume_than_the_queue_holds(self) -> None:
        queue, _ = self.outlet.open("a", {})
        for number in range(50):
            self.outlet.hold("a", (f"r{number}", 1))
        self.outlet.close("a", queue)
        self.outlet.send([Tokens(f"r{number}", 1, (Token(0, 0, 1),)) for number in range(50)])
        again, _ = self.outlet.open("a", {(f"r{number}", 1): (0,) for number in range(50)})
        assert len(self.drain(again)) == 50

    async def test_a_router_that_stays_away_leaves_its_requests_to_be_cancelled(self) -> None:
        queue, _ = self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        self.outlet.close("a", queue)
        self.now_s = 4.0
        assert self.outlet.sweep() == []
        self.now_s = 5.5
        assert self.outlet.sweep() == [("r", 1)]

    async def test_what_is_over_is_forgotten_after_a_while(self) -> None:
        self.outlet.open("a", {})
        self.outlet.hold("a", ("r", 1))
        self.outlet.send([RequestFailed("r", 1, "engine_error", "broke")])
        assert self.outlet.live == 0
        assert not self.outlet.hold("a", ("r", 1)), "a Submit that comes twice is known"
        self.now_s = 11.0
        self.outlet.sweep()
        assert self.outlet.hold("a", ("r", 1))


class TestFeed:
    def test_load_when_it_changes_and_as_a_heartbeat(self) -> None:
        now_s = [0.0]
        feed = Feed(PagesChanged(0, (), snapshot=True), lambda: now_s[0])
        assert len(list(feed.due(Load()))) == 2
        assert list(feed.due(Load())) == []
        assert list(feed.due(Load(running_requests=1))) == [Load(running_requests=1)]
        now_s[0] = HEARTBEAT_S
        assert list(feed.due(Load(running_requests=1))) == [Load(running_requests=1)]

    def test_overflow_asks_for_a_snapshot(self) -> None:
        feed = Feed(PagesChanged(0, (), snapshot=True), lambda: 0.0)
        for number in range(1, MAX_PENDING + 2):
            feed.changed(PagesChanged(number))
        assert feed.overflowed
        feed.replace(PagesChanged(99, (), snapshot=True))
        assert list(feed.due(Load()))[1:] == [PagesChanged(99, (), snapshot=True)]


class Wire:
    """A worker's servicer and a router's client over a Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"unix:{folder / 's'}"
        self.workers = Workers(monotonic_s)
        times = SessionTimes(resume_s=1.0, silence_s=1.5, retry_s=0.02)
        self.client = WorkerClient(self.endpoint, "router-1", self.workers, monotonic_s, times)
        self.inbox = self.workers.open("r", 1, (INFO.worker,), lambda: [self.next_index])
        self.next_index = 0

    async def serve(self, info: WorkerInfo = INFO) -> None:
        self.tier = ScriptedTier(info)
        self.outlet = Outlet(monotonic_s)
        self.servicer = WorkerServicer(Desk(self.tier, self.outlet), monotonic_s, lambda: b"# metrics\n", self.paths)
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        add_worker_service(self.server, self.servicer)
        self.server.add_insecure_port(self.endpoint)
        await self.server.start()

    async def paths(self, probe: Peer | None, ticket: bytes) -> list[PathReport]:
        if probe is None:
            return []
        if ticket != b"good":
            raise BadTicket("no ticket")
        return [PathReport(probe.worker, "ucx", probe.endpoint, 2.5e9, 3e-5, 1.5, "slow")]

    async def up(self) -> None:
        async with asyncio.timeout(10):
            while not self.workers.infos():
                await self.workers.changed()

    async def next(self) -> object:
        async with asyncio.timeout(10):
            return (await self.inbox.messages.get())[1]

    async def stop(self) -> None:
        self.servicer.close()
        await self.server.stop(0.5)


@pytest.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    wire = Wire(tmp_path)
    await wire.serve()
    running = asyncio.create_task(wire.client.run())
    await wire.up()
    yield wire
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await wire.stop()


SUBMIT = Submit(
    request_id="r",
    attempt=1,
    prompt_ids=(1, 2, 3),
    params=SamplingParams(
        max_tokens=9, min_tokens=2, n=2, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.8,
        repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4, logit_bias={5: 1.5}, stop_token_ids=(7,),
        ignore_eos=True, logprobs=0,
    ),
    seed=-5,
    deadline_s=12.5,
    peer=Peer(WorkerId("p0", 2**63 - 1), "unix:/p"),
    emitted=((4, 5), (6,)),
    finished=(1,),
    salt=b"\x00salt",
    priority=-3,
    lender=Peer(WorkerId("d1", 4), "unix:/d1"),
    lent_tokens=160,
    ticket=b"ticket",
    loan_ticket=b"loan",
)  # fmt: skip


class TestOverGrpc:
    async def test_a_submit_arrives_as_it_was_sent(self, wire: Wire) -> None:
        wire.workers.submit(INFO.worker, SUBMIT)
        async with asyncio.timeout(10):
            while not wire.tier.submitted:
                await asyncio.sleep(0.01)
        assert wire.tier.submitted == [SUBMIT]
        assert wire.workers.info(INFO.worker) == INFO

    async def test_a_loan_is_asked_for_as_it_was_sent(self, wire: Wire) -> None:
        lend = Lend("r", 2, tuple(range(32)), Peer(WorkerId("p0", 3), "unix:/p0"), 7.5, b"salt", b"ticket")
        assert wire.workers.lend(INFO.worker, replace(lend, prompt_ids=())), "it is sent, and ignored there"
        assert wire.workers.lend(INFO.worker, lend)
        async with asyncio.timeout(10):
            while not wire.tier.lent:
                await asyncio.sleep(0.01)
        assert wire.tier.lent == [lend]
        assert not wire.workers.lend(WorkerId("d9", 1), lend), "nobody to tell"

    async def test_tokens_failures_and_cancels(self, wire: Wire) -> None:
        wire.workers.submit(INFO.worker, SUBMIT)
        await asyncio.sleep(0.1)
        receipt = Receipt(1, 2, 3, 4, 5, 0.25, 0.5, 6, 7, 0.75)
        sent = Tokens("r", 1, (Token(1, 0, 9, -1.5, ((9, -1.5),), FinishReason.STOP),), receipt)
        wire.outlet.send([sent])
        assert await wire.next() == sent
        wire.outlet.send([RequestFailed("r", 1, "peer_lost", "gone", WorkerId("p0", 3))])
        assert await wire.next() == RequestFailed("r", 1, "peer_lost", "gone", WorkerId("p0", 3))
        wire.workers.cancel(INFO.worker, Cancel("r", 1, (1,)))
        wire.workers.cancel(INFO.worker, Cancel("r", 1))
        async with asyncio.timeout(10):
            while len(wire.tier.cancelled) < 2:
                await asyncio.sleep(0.01)
        assert wire.tier.cancelled == [Cancel("r", 1, (1,)), Cancel("r", 1)]

    async def test_a_refused_submit_is_answered(self, wire: Wire) -> None:
        wire.tier.refuses = InvalidRequest("no")
        wire.workers.submit(INFO.worker, SUBMIT)
        failed = await wire.next()
        assert isinstance(failed, RequestFailed)
        assert failed.code == "invalid_value"

    async def test_a_break_is_resumed_without_loss(self, wire: Wire) -> None:
        wire.workers.submit(INFO.worker, SUBMIT)
        await asyncio.sleep(0.1)
        wire.outlet.send([token(0)])
        assert isinstance(await wire.next(), Tokens)
        wire.next_index = 1
        queue = wire.outlet._routers["router-1"]
        queue.end()
        wire.outlet.send([token(1)])
        found = await wire.next()
        assert isinstance(found, Tokens)
        assert [t.index for t in found.tokens] == [1]
        assert wire.tier.cancelled == []

    async def test_another_incarnation_is_a_stranger(self, wire: Wire) -> None:
        await wire.stop()
        stranger = WorkerInfo(WorkerId("d0", 8), Role.DECODE, "model", "layout", 16, 100, 4096, "")
        await wire.serve(stranger)
        assert await wire.next() == Lost(INFO.worker)
        await wire.up()
        assert [info for info, _ in wire.workers.infos()] == [stranger]

    async def test_the_first_message_of_a_new_session_is_not_lost(self, wire: Wire) -> None:
        """A sender that outlived the broken session would take it."""
        await wire.stop()
        await wire.serve(stranger := WorkerInfo(WorkerId("d0", 8), Role.DECODE, "model", "layout", 16, 100, 4096, ""))
        assert await wire.next() == Lost(INFO.worker)
        await wire.up()
        wire.workers.submit(stranger.worker, SUBMIT)
        async with asyncio.timeout(10):
            while not wire.tier.submitted:
                await asyncio.sleep(0.01)

    async def test_nothing_is_placed_on_a_worker_whose_session_is_broken(self, wire: Wire) -> None:
        assert [c.worker for c in wire.workers.candidates((1, 2), b"")] == [INFO.worker]
        wire.workers.broken(INFO.worker)
        assert wire.workers.candidates((1, 2), b"") == []
        wire.workers.up(INFO, wire.client)
        assert [c.worker for c in wire.workers.candidates((1, 2), b"")] == [INFO.worker]

    async def test_a_worker_that_does_not_come_back_is_lost(self, wire: Wire) -> None:
        await wire.stop()
        assert await wire.next() == Lost(INFO.worker)
        await wire.serve()

    async def test_silence_is_a_loss(self, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Feed, "due", lambda self, load: ())
        assert await wire.next() == Lost(INFO.worker)

    async def test_events_health_and_metrics(self, wire: Wire) -> None:
        wire.tier.changes.append(PagesChanged(1, (b"b" * 16,)))
        wire.servicer.publish()
        wire.tier.load_now = Load(1, 2, 3, {"free": 5}, 6.5, 7.5, {"queued": 8}, True)
        async with asyncio.timeout(10):
            while wire.workers.infos()[0][1] != wire.tier.load_now:
                await wire.workers.changed()
        assert await wire.client.health() > 0
        assert await wire.client.metrics() == b"# metrics\n"
        wire.tier.stuck = True
        with pytest.raises(EngineError, match="stuck"):
            await wire.client.health()

    async def test_paths_cross_the_wire_as_they_are(self, wire: Wire) -> None:
        await wire.up()
        assert await wire.client.paths(None, b"") == []
        peer = Peer(WorkerId("p", 2**62), "unix:/tmp/p")
        report = PathReport(peer.worker, "ucx", peer.endpoint, 2.5e9, 3e-5, 1.5, "slow")
        assert await wire.client.paths(peer, b"good") == [report]
        with pytest.raises(WorkerLost, match="no ticket"):
            await wire.client.paths(peer, b"bad")
        visitor = Visitor(wire.endpoint, Channels())
        assert await visitor.info(5.0) == INFO and await visitor.paths(peer, b"good") == [report]
        await wire.server.stop(0)
        with pytest.raises(WorkerLost):
            await visitor.info(0.2)
        await visitor.close()
        wire.client._stub = None
        with pytest.raises(WorkerLost):
            await wire.client.paths(None, b"")
