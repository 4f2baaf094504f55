"""What a worker does with a question for its paths; which transports it has; what its metrics show of them."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from baton import path_probe, transports
from baton.options import WorkerOptions
from baton.path_probe import PathProbe
from core.clock import monotonic_s
from core.errors import BadTicket, ConfigError
from core.layout import PageLayout
from core.messages import PathReport, Peer, Role, WorkerId, WorkerInfo
from core.security.gate import Gate
from core.security.tickets import Tickets, probe_claims
from core.telemetry.path_metrics import MAX_PEERS, PathMetrics
from kvtransfer.digest import XXH3_64, algorithm
from kvtransfer.frames import Frames
from kvtransfer.host import Host
from kvtransfer.memory import MemoryFabric, MemoryTransport
from kvtransfer.paths import Paths

LAYOUT = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=16, dtype="float32")
P, D = Peer(WorkerId("p", 1), ""), Peer(WorkerId("d", 2), "unix:/d")
INFO = WorkerInfo(P.worker, Role.PREFILL, "", "", 16, 8, 1024, "")
TICKETS = Tickets([b"k" * 32])


@dataclass
class Pair:
    p: Paths
    d: Paths
    dialled: list[Peer]

    def dial(self, peer: Peer) -> None:
        self.dialled.append(peer)

    async def meet(self) -> None:
        await self.d.meet(P.worker, await self.p.invite(D.worker))
        await self.p.meet(D.worker, await self.d.invite(P.worker))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    fabric = MemoryFabric(Random(1))
    ends = {}
    for peer in (P, D):
        inner = {"memory": MemoryTransport(peer.worker, fabric)}
        ends[peer.worker.name] = paths = Paths(inner, host=Host("boot", 1, 1), clock=monotonic_s)
        await paths.serve(Frames.anonymous(LAYOUT, 8), algorithm(XXH3_64))
    yield Pair(ends["p"], ends["d"], [])
    for paths in ends.values():
        await paths.close()


def ticket(nonce: str) -> bytes:
    return TICKETS.sign(probe_claims(D, P, nonce))


async def test_nobody_is_dialled_without_a_ticket_for_it(pair: Pair) -> None:
    probe = PathProbe(pair.p, Gate(TICKETS, INFO), pair.dial)
    assert await probe(None, b"") == ()
    wrong = TICKETS.sign(probe_claims(replace(D, endpoint="evil:1"), P, "n"))
    for shown in (b"", wrong):
        with pytest.raises(BadTicket):
            await probe(D, shown)
    assert pair.dialled == []


async def test_a_probe_dials_once_and_proves(pair: Pair) -> None:
    probe = PathProbe(pair.p, Gate(TICKETS, INFO), pair.dial)
    asking = asyncio.ensure_future(probe(D, ticket("1")))
    while not pair.dialled:
        await asyncio.sleep(0)
    await pair.meet()
    (report,) = await asking
    assert report.transport == "memory" and report.peer == D.worker and report.proved_s < 5.0
    await probe(D, ticket("2"))
    assert pair.dialled == [D], "the session was there"


async def test_a_peer_that_cannot_be_reached_is_said_to_be_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_probe, "REACH_S", 0.05)
    (report,) = await PathProbe(pair.p, Gate(None, INFO), pair.dial)(D, b"")
    assert report.transport == "" and "no session with d at unix:/d" in report.trouble and pair.dialled == [D]
    (report,) = await PathProbe(pair.d, Gate(None, INFO), None)(P, b"")
    assert report.trouble.startswith("no session with p within")


# --- which transports there are --------------------------------------------------------------------------------


def options(**fields: Any) -> WorkerOptions:
    return WorkerOptions(name="p", role="prefill", model="m", listen="unix:/p", **fields)


def names(paths: Paths) -> list[str]:
    return list(paths._transports)


def test_a_worker_has_what_is_asked_for_as_far_as_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(transports.paths_for(options(), monotonic_s, on_gpu=False)) == ["shm", "ucx"]
    assert names(transports.paths_for(options(transport="shm"), monotonic_s, on_gpu=False)) == ["shm"]
    assert names(transports.paths_for(options(transport="ucx"), monotonic_s, on_gpu=False)) == ["ucx"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert names(transports.paths_for(options(), monotonic_s, on_gpu=False)) == ["shm"]
    assert "ucxx is not installed" in caplog.text
    with pytest.raises(ConfigError, match="needs ucxx"):
        transports.paths_for(options(transport="ucx"), monotonic_s, on_gpu=False)


def test_a_pool_on_a_gpu_is_shared_by_cuda() -> None:
    def ways(wanted: str, on_gpu: bool = True) -> list[str]:
        return names(transports.paths_for(options(transport=wanted), monotonic_s, on_gpu))

    assert ways("auto") == ["cuda", "ucx"] and ways("local") == ways("cuda") == ["cuda"] and ways("ucx") == ["ucx"]
    assert ways("local", on_gpu=False) == ["shm"]
    with pytest.raises(ConfigError, match=r"--transport shm .* use local or auto"):
        ways("shm")
    with pytest.raises(ConfigError, match=r"--transport cuda .* use local or auto"):
        ways("cuda", on_gpu=False)


def test_what_is_expected_must_be_among_them() -> None:
    with pytest.raises(ConfigError, match="--expect-transport 'ucx' is not one of those in use: shm"):
        transports.paths_for(options(transport="shm", expect_transport="ucx"), monotonic_s, on_gpu=False)


# --- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_show_the_present_paths_and_name_a_bounded_number_of_peers() -> None:
    registry = CollectorRegistry()
    metrics = PathMetrics(registry, {"model_name": "m", "engine": "d"})
    metrics.show([PathReport(P.worker, "shm", "", 5e9, 2e-5, 1.0, ""), PathReport(D.worker, "", "", 0, 0, 0, "none")])
    text = generate_latest(registry).decode()
    assert 'baton:path_bytes_per_second{engine="d",model_name="m",peer="p",transport="shm"} 5e+09' in text
    assert 'baton:path_latency_seconds{engine="d",model_name="m",peer="p",transport="shm"} 2e-05' in text
    assert 'baton:path_degraded{engine="d",model_name="m",peer="d",transport="none"} 1.0' in text
    assert text.count('peer="d"') == 1, "without a path there is nothing else to tell"
    metrics.show([])
    assert 'peer="p"' not in generate_latest(registry).decode(), "a peer that is gone"
    for number in range(2 * MAX_PEERS):
        metrics.fell_back(f"p{number}", "ucx")
    lines = [line for line in generate_latest(registry).decode().splitlines() if "path_fallbacks_total{" in line]
    assert len(lines) == MAX_PEERS + 1
    assert any('peer="others"' in line and line.endswith(f" {MAX_PEERS}.0") for line in lines)
