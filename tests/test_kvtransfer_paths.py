"""Paths: which transport a pair may use, what proves it, how it falls back and returns, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest

from baton.doctor_judgement import judge
from core.errors import ConfigError, HandoffError, PeerLost
from core.layout import PageLayout
from core.messages import PathReport, WorkerId
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_in_memory import InMemoryDevice
from kvtransfer.digest import XXH3_64, algorithm, digest_page
from kvtransfer.frames import Frames
from kvtransfer.host import Host, this_host, why_no_shared_memory
from kvtransfer.memory import CALM, MemoryFabric, MemoryTransport, Mischief
from kvtransfer.path_choice import (
    ANY,
    PAUSE_S,
    Expectation,
    Route,
    better_than,
    fell_back,
    routes_to,
    to_try,
    trouble_of,
    what_was_tried,
)
from kvtransfer.path_descriptor import MAX_BYTES, PathDescriptor
from kvtransfer.paths import Paths, PathTerms
from kvtransfer.proof import Measure, pattern, pattern_digests
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import Piece, Transport
from kvtransfer.ucx import UcxTransport
from router.path_survey import PairPath, PathReply
from tests.kvtransfer_seen import Seen, served

LAYOUT = PageLayout(kv_heads=2, layers=2, page_size=16, head_dim=64, dtype="float32")  # 32 KiB
PAGES = 8
XXH3 = algorithm(XXH3_64)
P, D = WorkerId("p", 7), WorkerId("d", 8)
HERE = Host("boot-1", 4026531833, 1000)
OTHER_MACHINE, OTHER_NETWORK = replace(HERE, boot_id="boot-2"), replace(HERE, network=4026532000)
BOTH = {"shm": b"s", "ucx": b"u"}
ORDER = ("shm", "ucx")


# --- the choice ------------------------------------------------------------------------------------------------


def usable(theirs: Host, offered: dict[str, bytes] = BOTH, expect: Expectation = ANY) -> list[str]:
    return [route.name for route in routes_to(HERE, theirs, ORDER, offered, expect) if not route.barrier]


@pytest.mark.parametrize(
    "theirs,offered,wanted",
    [
        (HERE, BOTH, ["shm", "ucx"]),
        (OTHER_MACHINE, BOTH, ["ucx"]),
        (OTHER_NETWORK, BOTH, ["ucx"]),
        (replace(HERE, uid=0), BOTH, ["ucx"]),
        (HERE, {"shm": b"s"}, ["shm"]),
        (HERE, {"ucx": b"u", "carrier-pigeon": b"c"}, ["ucx"]),
        (OTHER_MACHINE, {"shm": b"s"}, []),
    ],
)
def test_shared_memory_is_for_one_host_and_the_rest_for_all(
    theirs: Host, offered: dict[str, bytes], wanted: list[str]
) -> None:
    assert usable(theirs, offered) == wanted


GPU, OTHER_GPU = replace(HERE, device="GPU-1"), replace(HERE, device="GPU-2")
FAR_GPU = replace(OTHER_MACHINE, device="GPU-3")
ON_GPU = {"cuda": b"c", "ucx": b"u"}


@pytest.mark.parametrize(
    "mine,theirs,wanted",
    [
        (GPU, GPU, ["cuda", "ucx"]),
        (GPU, OTHER_GPU, ["cuda", "ucx"]),
        (GPU, FAR_GPU, ["ucx"]),
        (GPU, replace(OTHER_NETWORK, device="GPU-1"), ["ucx"]),
        (GPU, replace(GPU, uid=0), ["ucx"]),
        (GPU, HERE, ["ucx"]),
        (HERE, GPU, ["ucx"]),
        (HERE, HERE, ["shm", "ucx"]),
    ],
)
def test_pools_on_gpus_share_memory_with_each_other_alone(mine: Host, theirs: Host, wanted: list[str]) -> None:
    """What each worker has follows from where its pool is; and all names at once, as a peer may offer anything."""
    ways = [ON_GPU if host.device else BOTH for host in (mine, theirs)]
    assert [route.name for route in routes_to(mine, theirs, list(ways[0]), ways[1]) if not route.barrier] == wanted
    every = {**BOTH, **ON_GPU}
    routes = routes_to(mine, theirs, ["cuda", "shm", "ucx"], every)
    assert [route.name for route in routes if not route.barrier] == wanted


def test_a_pool_on_a_gpu_and_one_in_memory_without_ucx_say_what_stands_between_them() -> None:
    routes = routes_to(GPU, HERE, ["cuda"], {"shm": b"s"})
    assert what_was_tried(routes) == "no path; cuda: our pages lie in a GPU's memory, the peer's in the host's"
    routes = routes_to(HERE, GPU, ["shm"], {"cuda": b"c"})
    assert what_was_tried(routes) == "no path; shm: our pages lie in the host's memory, the peer's in a GPU's"
    (finding,) = judge(PathReply((PairPath("p", "d", trouble=what_was_tried(routes)),)))
    assert finding.wrong and "same --device" in finding.advice


def test_what_is_expected_comes_first_and_alone_when_nothing_else_may_be_used() -> None:
    assert usable(HERE, expect=Expectation("ucx")) == ["ucx", "shm"]
    assert usable(HERE, expect=Expectation("ucx", strict=True)) == ["ucx"]
    assert usable(OTHER_MACHINE, expect=Expectation("shm", strict=True)) == []
    assert Expectation.parse("ucx:rc", ORDER, strict=False) == Expectation("ucx", "rc")
    with pytest.raises(ConfigError, match="--expect-transport 'rdma'"):
        Expectation.parse("rdma", ORDER, strict=False)


def test_lanes_can_be_expected() -> None:
    rc = Expectation("ucx", "rc")
    assert rc.unmet("ucx", "tcp/eth0, rc_mlx5/mlx5_0:1") == ""
    assert rc.unmet("ucx", "tcp/eth0") == "expected ucx over rc, got tcp/eth0"
    assert rc.unmet("shm", "") == "expected ucx, got shm"
    assert ANY.unmet("ucx", "tcp/eth0") == ""


def test_what_failed_rests_for_a_pause_that_doubles_and_ends_with_success() -> None:
    shm, ucx = routes = routes_to(HERE, HERE, ORDER, BOTH)
    shm.met = ucx.met = True
    first_s, longest_s = PAUSE_S
    shm.failed("broke", 10.0)
    assert to_try(routes, 10.0) == [ucx] and better_than(ucx, routes, 10.0) is None
    assert better_than(ucx, routes, 10.0 + first_s) is shm and to_try(routes, 10.0 + first_s) == [ucx], "not met yet"
    for _ in range(20):
        shm.failed("broke", 100.0)
    assert shm.retry_s == 100.0 + longest_s
    shm.proved(Measure(1e-5, 1e10), 200.0)
    shm.failed("broke", 200.0)
    assert shm.retry_s == 200.0 + first_s


def test_trouble_names_what_would_have_been_better_and_why_it_is_not_used() -> None:
    routes = routes_to(HERE, OTHER_NETWORK, ORDER, BOTH)
    said = trouble_of(routes[1], routes, "", one_machine=True)
    assert said == "shm cannot be used: the workers are in different network namespaces of one machine"
    assert not fell_back(routes[1], routes, "")
    assert trouble_of(routes[1], routes, "", one_machine=False) == "", "nobody expects it of two machines"
    routes = routes_to(HERE, HERE, ORDER, BOTH)
    routes[0].failed("no pool", 1.0)
    assert trouble_of(routes[1], routes, "expected shm, got ucx", one_machine=True) == (
        "expected shm, got ucx; shm failed: no pool"
    )
    assert fell_back(routes[1], routes, "") and not fell_back(routes[0], routes, "")


def test_this_host_shares_memory_with_itself() -> None:
    assert this_host() == this_host() and why_no_shared_memory(this_host(), this_host()) == ""


# --- the descriptor and the pattern ----------------------------------------------------------------------------


def test_a_descriptor_comes_back_as_it_went() -> None:
    sent = PathDescriptor(HERE, PAGES, b"12345678", {"shm": b"\x00\xff", "ucx": bytes(900)})
    assert PathDescriptor.decode(sent.encode()) == sent
    assert b"device" not in sent.encode(), "as before there were pools on devices"
    on_gpu = replace(sent, host=GPU)
    assert PathDescriptor.decode(on_gpu.encode()) == on_gpu and b'"device": "GPU-1"' in on_gpu.encode()
    with pytest.raises(HandoffError, match="over"):
        replace(sent, transports={"ucx": bytes(MAX_BYTES)}).encode()


GOOD = PathDescriptor(HERE, PAGES, b"12345678", BOTH).encode()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff" * 100,
        b"x" * (MAX_BYTES + 1),
        GOOD[:-5],
        GOOD.replace(b'"version": 1', b'"version": 2'),
        GOOD.replace(b'"pages": 8', b'"pages": -8'),
        GOOD.replace(b'"pages": 8', b'"pages": "8"'),
        GOOD.replace(b'"seed": "', b'"seed": "00'),
        GOOD.replace(b'"uid": 1000', b'"uid": null'),
        GOOD.replace(b'"shm"', b'"' + b"s" * 33 + b'"'),
        GOOD.replace(b'"host"', b'"ghost"'),
        GOOD.replace(b'"uid": 1000', b'"uid": 1000, "device": 5'),
        GOOD.replace(b'"cw=="', b'"cw"'),
        GOOD.replace(b'"cw=="', b"7"),
    ],
)
def test_a_broken_descriptor_is_an_error_of_the_hand_off(broken: bytes) -> None:
    assert broken != GOOD
    with pytest.raises(HandoffError):
        PathDescriptor.decode(broken)


def test_patterns_differ_in_every_word_and_between_workers() -> None:
    one, other = pattern(b"seed-one", LAYOUT.page_bytes), pattern(b"seed-two", LAYOUT.page_bytes)
    words = {one[at : at + 8] for at in range(0, len(one), 8)}
    assert len(one) == LAYOUT.page_bytes and len(words) == len(one) // 8
    assert all(one[at : at + 8] != other[at : at + 8] for at in range(0, len(one), 8))
    assert len(pattern(b"seed-one", 1001)) == 1001
    assert pattern_digests(b"seed-one", LAYOUT, XXH3) == digest_page(memoryview(one), LAYOUT, 0, XXH3)


# --- a pair ----------------------------------------------------------------------------------------------------


@dataclass
class End:
    """One worker: paths over its ends of two fabrics."""

    me: WorkerId
    paths: Paths
    frames: Frames
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    renewed: list[WorkerId] = field(default_factory=list)


class Rig:
    """P and D, joined by a fabric that passes for shm and another that passes for ucx."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.shm, self.ucx = MemoryFabric(Random(1)), MemoryFabric(Random(2))
        self.ends: list[End] = []

    async def add(self, me: WorkerId, host: Host, **terms: Any) -> End:
        inner = {"shm": MemoryTransport(me, self.shm), "ucx": MemoryTransport(me, self.ucx)}
        seed, terms = Random(me.incarnation).randbytes, {"renew_s": 0.2, **terms}
        paths = Paths(inner, host=host, clock=lambda: self.now_s, terms=PathTerms(**terms), random_bytes=seed)
        end = End(me, paths, Frames.anonymous(LAYOUT, PAGES))
        paths.on_fallback = lambda peer, transport: end.fallbacks.append((peer, transport))
        paths.renew = end.renewed.append
        await paths.serve(end.frames, XXH3)
        end.frames.buffer[:] = Random(me.incarnation).randbytes(len(end.frames.buffer))
        self.ends.append(end)
        return end

    async def pair(self, theirs: Host = HERE, **terms: Any) -> tuple[End, End]:
        p, d = await self.add(P, HERE), await self.add(D, theirs, **terms)
        await self.meet(p, d)
        return p, d

    async def meet(self, p: End, d: End) -> None:
        """What the first messages of a session do."""
        await d.paths.meet(p.me, await p.paths.invite(d.me))
        await p.paths.meet(d.me, await d.paths.invite(p.me))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    for end in rig.ends:
        await end.paths.close()
        end.frames.close()
    assert not rig.shm.touched(D) and not rig.ucx.touched(D)


async def fetched(p: End, d: End, page: int = 3) -> None:
    """One page crosses."""
    d.frames.page(5)[:] = bytes(LAYOUT.page_bytes)
    assert await d.paths.fetch(P, 1, [Piece(page, 0, 5)]) == [digest_page(p.frames.buffer, LAYOUT, page, XXH3)]
    assert d.frames.page(5) == p.frames.page(page)


def row(end: End) -> PathReport:
    (report,) = end.paths.snapshot()
    return report


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("theirs,wanted", [(HERE, "shm"), (OTHER_MACHINE, "ucx"), (OTHER_NETWORK, "ucx")])
async def test_a_pair_uses_the_best_that_its_hosts_allow_and_proves_it_before_any_page(
    rig: Rig, theirs: Host, wanted: str
) -> None:
    p, d = await rig.pair(theirs)
    assert row(d) == PathReport(P, "", "", 0.0, 0.0, 0.0, "")
    await fetched(p, d)
    assert bytes(d.frames.frame(d.frames.landing)) == bytes(p.frames.frame(p.frames.pattern))
    assert row(d).transport == wanted and row(d).bytes_per_s > 0 and not d.fallbacks
    rig.now_s += 7.0
    assert row(d).proved_s == 7.0


async def test_a_path_that_changes_bytes_carries_no_page(rig: Rig) -> None:
    rig.shm.mischief = replace(CALM, corrupt=1.0)
    p, d = await rig.pair()
    await fetched(p, d)
    assert row(d).transport == "ucx" and d.fallbacks == [("p", "ucx")]
    assert "shm failed: the pattern of p@7 arrived with other bytes" in row(d).trouble


async def test_an_older_pattern_in_the_landing_proves_nothing(rig: Rig) -> None:
    p, d = await rig.pair()
    await fetched(p, d)
    p.frames.frame(p.frames.pattern)[:] = bytes(LAYOUT.page_bytes)  # as from a pool that lies elsewhere
    await d.paths.probe(P)
    assert row(d).transport == "" and "shm: the pattern" in row(d).trouble and "ucx: the pattern" in row(d).trouble
    with pytest.raises(PeerLost, match="no path; shm: the pattern"):
        await d.paths.fetch(P, 1, [Piece(1, 0, 1)])


async def test_when_a_path_breaks_the_next_one_finishes_the_fetch_and_the_better_one_returns(rig: Rig) -> None:
    p, d = await rig.pair()
    await fetched(p, d)
    rig.shm.kill(P)
    await fetched(p, d)
    assert row(d).transport == "ucx" and "shm failed" in row(d).trouble and d.fallbacks == [("p", "ucx")]
    rig.shm.join(P, p.frames, XXH3)
    await fetched(p, d)
    assert row(d).transport == "ucx" and not d.renewed, "it rests"
    rig.now_s += PAUSE_S[0]
    await fetched(p, d)
    await fetched(p, d)
    assert d.renewed == [P], "asked for another session, once in a pause"
    await rig.meet(p, d)
    await fetched(p, d)
    await until(lambda: row(d).transport == "shm")
    assert row(d).trouble == ""
    await fetched(p, d)


async def test_without_a_path_the_error_says_what_was_tried_and_another_session_is_asked_for(rig: Rig) -> None:
    p, d = await rig.pair()
    rig.shm.kill(P)
    rig.ucx.kill(P)
    with pytest.raises(PeerLost, match=r"no path; shm: p@7 is gone; ucx: p@7 is gone"):
        await fetched(p, d)
    assert row(d).trouble.startswith("no path; shm: p@7 is gone") and not d.fallbacks
    with pytest.raises(PeerLost, match="no path"):
        await fetched(p, d)
    assert not d.renewed
    rig.now_s += PAUSE_S[0]
    with pytest.raises(PeerLost, match="no path"):
        await fetched(p, d)
    assert d.renewed == [P], "and nobody came in time"
    for fabric in (rig.shm, rig.ucx):
        fabric.join(P, p.frames, XXH3)
    rig.now_s += PAUSE_S[1]
    waiting = asyncio.ensure_future(fetched(p, d))
    await until(lambda: d.renewed == [P, P])
    await rig.meet(p, d)
    await waiting
    assert row(d).transport == "shm"


async def test_a_pair_that_waits_for_another_session_is_lost_when_it_is_forgotten(rig: Rig) -> None:
    p, d = await rig.pair()
    rig.shm.kill(P)
    rig.ucx.kill(P)
    with pytest.raises(PeerLost, match="no path"):
        await fetched(p, d)
    rig.now_s += PAUSE_S[0]
    waiting = asyncio.ensure_future(d.paths.fetch(P, 1, [Piece(1, 0, 1)]))
    await until(lambda: d.renewed == [P])
    async with asyncio.timeout(0.15):
        await d.paths.forget(P)
        with pytest.raises(PeerLost, match="was cut off"):
            await waiting


async def test_a_pair_with_nothing_in_common_says_why(rig: Rig) -> None:
    p, d = await rig.pair(OTHER_MACHINE, expect=Expectation("shm", strict=True))
    with pytest.raises(PeerLost, match="shm: the workers are on different machines; ucx: only shm may be used"):
        await fetched(p, d)
    assert row(d).transport == "" and "different machines" in row(d).trouble


async def test_a_fall_back_from_what_is_expected_is_complained_about_or_refused(rig: Rig) -> None:
    rig.shm.mischief = replace(CALM, corrupt=1.0)
    p, d = await rig.pair(expect=Expectation("shm"))
    await fetched(p, d)
    assert row(d).trouble.startswith("expected shm, got ucx; shm failed") and d.fallbacks == [("p", "ucx")]
    strict = await rig.add(WorkerId("d2", 9), HERE, expect=Expectation("shm", strict=True))
    await rig.meet(p, strict)
    with pytest.raises(PeerLost, match="ucx: only shm may be used here"):
        await strict.paths.fetch(P, 1, [Piece(1, 0, 1)])


async def test_lanes_that_are_not_those_expected_are_no_path(rig: Rig) -> None:
    p, d = await rig.pair(OTHER_MACHINE, expect=Expectation("ucx", "rc", strict=True))
    with pytest.raises(PeerLost, match="ucx: expected ucx over rc, got lanes that are not known"):
        await fetched(p, d)


async def test_a_path_that_hangs_is_given_up_in_time_and_nothing_of_it_lands(rig: Rig) -> None:
    rig.shm.mischief = Mischief(hang=1.0, ghost_delay_s=0.0002)
    p, d = await rig.pair(proof_s=0.05)
    await fetched(p, d)
    assert "shm failed: no answer within" in row(d).trouble
    landed = bytes(d.frames.everything)
    await asyncio.sleep(0.01)
    assert bytes(d.frames.everything) == landed and not rig.shm.touched(D)


async def test_a_path_in_use_is_measured_again_after_its_period_and_fails_if_it_has_become_bad(rig: Rig) -> None:
    p, d = await rig.pair(period_s=60.0)
    await fetched(p, d)
    rig.now_s += 59.0
    await fetched(p, d)
    await asyncio.sleep(0.01)
    assert row(d).proved_s == 59.0
    rig.now_s += 2.0
    await fetched(p, d)
    await until(lambda: row(d).proved_s == 0.0)
    rig.shm.mischief = replace(CALM, corrupt=1.0)
    rig.now_s += 61.0
    await d.paths.fetch(P, 1, [Piece(3, 0, 5)])  # not our business: digests are the protocol's
    await until(lambda: row(d).transport != "shm")
    await fetched(p, d)
    assert row(d).transport == "ucx"


async def test_many_first_fetches_share_one_proof(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[str] = []
    real = Paths._prove

    async def prove(self: Paths, pair: Any, route: Route) -> bool:
        proofs.append(route.name)
        return await real(self, pair, route)

    monkeypatch.setattr(Paths, "_prove", prove)
    _, d = await rig.pair()
    await asyncio.gather(*(d.paths.fetch(P, n, [Piece(n, 0, n)]) for n in range(1, 6)))
    assert proofs == ["shm"]


async def test_a_cancelled_first_fetch_does_not_take_the_proof_along(rig: Rig) -> None:
    rig.shm.mischief = replace(CALM, delay_s=0.005)
    p, d = await rig.pair()
    first = asyncio.ensure_future(d.paths.fetch(P, 1, [Piece(1, 0, 1)]))
    second = asyncio.ensure_future(d.paths.fetch(P, 2, [Piece(2, 0, 2)]))
    await asyncio.sleep(0.002)
    first.cancel()
    assert await second == [digest_page(p.frames.buffer, LAYOUT, 2, XXH3)]
    assert first.cancelled()


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.03])
async def test_a_peer_forgotten_at_any_point_is_lost_and_can_be_met_again(rig: Rig, after_s: float) -> None:
    rig.shm.mischief = replace(CALM, delay_s=0.002, ghosts=True)
    p, d = await rig.pair()
    fetch = asyncio.ensure_future(d.paths.fetch(P, 1, [Piece(n, 0, n) for n in range(PAGES)]))
    await asyncio.sleep(after_s)
    async with asyncio.timeout(2.0):
        await d.paths.forget(P)
        (end,) = await asyncio.gather(fetch, return_exceptions=True)
    assert isinstance(end, PeerLost) and not rig.shm.touched(D) and d.paths.snapshot() == ()
    with pytest.raises(PeerLost, match="never met"):
        await fetched(p, d)
    await rig.meet(p, d)
    await fetched(p, d)


def real_way(first: str) -> tuple[Frames | Seen, Transport]:
    """A pool and what shares it on one host."""
    if first == "cuda":
        return Seen(Frames.on_device(LAYOUT, PAGES, InMemoryDevice())), CudaIpcTransport()
    return Frames.shared(LAYOUT, PAGES), ShmTransport()


@pytest.mark.parametrize("first", ["shm", "cuda"])
async def test_over_the_real_transports_a_pair_falls_back_to_ucx_and_both_are_met_again(first: str) -> None:
    """Shared memory ends, then the source cuts UCX off as well; another session brings each of them back."""
    now_s = 0.0
    ways = {P: real_way(first), D: real_way(first)}
    frames = {me: way[0] for me, way in ways.items()}
    paths = {
        me: Paths({first: way[1], "ucx": UcxTransport(tls="tcp")}, host=HERE, clock=lambda: now_s)
        for me, way in ways.items()
    }
    renewed: list[WorkerId] = []
    p, d = paths[P], paths[D]
    d.renew = renewed.append
    for me in (P, D):
        await paths[me].serve(served(frames[me]), XXH3)
    frames[P].buffer[:] = Random(1).randbytes(len(frames[P].buffer))

    async def session() -> None:
        await d.meet(P, await p.invite(D))
        await p.meet(D, await d.invite(P))

    async def comes_over(transport: str) -> None:
        async with asyncio.timeout(10.0):
            await d.fetch(P, 1, [Piece(page, 0, page) for page in range(PAGES)])
        assert frames[D].buffer == frames[P].buffer and d.snapshot()[0].transport == transport
        frames[D].buffer[:] = bytes(len(frames[D].buffer))

    await session()
    await comes_over(first)
    (pair,) = d._pairs.values()
    await d._give_up(pair, pair.routes[0], "for a test")
    await comes_over("ucx")
    assert d.snapshot()[0].lanes.startswith("tcp/") and f"{first} failed: for a test" in d.snapshot()[0].trouble
    await p._transports["ucx"].forget(D)
    with pytest.raises(PeerLost, match=f"no path; {first}: for a test; ucx: "):
        await comes_over("ucx")
    now_s += PAUSE_S[0]
    waiting = asyncio.ensure_future(comes_over(first))
    await until(lambda: renewed == [P])
    await session()
    await waiting
    await d._give_up(pair, pair.routes[0], "again")
    await comes_over("ucx")
    for me in (D, P):
        await paths[me].close()
        frames[me].close()


@pytest.mark.parametrize("on_gpu", [P, D])
async def test_a_pool_on_a_device_and_one_in_memory_meet_over_ucx(on_gpu: WorkerId) -> None:
    ways = {me: real_way("cuda" if me == on_gpu else "shm") for me in (P, D)}
    paths = {
        me: Paths({way[1].name: way[1], "ucx": UcxTransport(tls="tcp")}, host=HERE, clock=lambda: 0.0)
        for me, way in ways.items()
    }
    frames, p, d = {me: way[0] for me, way in ways.items()}, paths[P], paths[D]
    for me in (P, D):
        await paths[me].serve(served(frames[me]), XXH3)
    frames[P].buffer[:] = Random(1).randbytes(len(frames[P].buffer))
    await d.meet(P, await p.invite(D))
    await p.meet(D, await d.invite(P))
    await d.fetch(P, 1, [Piece(page, 0, page) for page in range(PAGES)])
    assert frames[D].buffer == frames[P].buffer
    report = d.snapshot()[0]
    assert report.transport == "ucx" and "our pages lie in" in report.trouble and not report.trouble.endswith("have it")
    for me in (D, P):
        await paths[me].close()
        frames[me].close()


async def test_a_settled_path_settles_until_another_one_has_been_used() -> None:
    theirs, ours, fabric = Frames.shared(LAYOUT, PAGES), Frames.shared(LAYOUT, PAGES), MemoryFabric(Random(3))
    p = Paths({"shm": ShmTransport(), "ucx": MemoryTransport(P, fabric)}, host=HERE, clock=lambda: 0.0)
    d = Paths({"shm": ShmTransport(), "ucx": MemoryTransport(D, fabric)}, host=HERE, clock=lambda: 0.0)
    await p.serve(theirs, XXH3)
    await d.serve(ours, XXH3)
    await d.meet(P, await p.invite(D))
    await d.fetch(P, 1, [Piece(1, 0, 1)])
    assert d.settles_on_return and d.snapshot()[0].transport == "shm"
    await p._transports["shm"].close()  # the source's socket is gone, and its mapping of ours is dropped
    await d._give_up(d._pairs[P], d._pairs[P].routes[0], "for a test")
    await d.fetch(P, 1, [Piece(2, 0, 2)])
    assert not d.settles_on_return and d.snapshot()[0].transport == "ucx"
    assert ours.page(2) == theirs.page(2)
    for paths, frames in ((d, ours), (p, theirs)):
        await paths.close()
        frames.close()
