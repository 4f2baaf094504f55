"""The connections between router, prefill and decode worker go bad under load; the bytes of pages have another way.

Every request ends right or with one clear error, the next ones are served soon after, and nothing is left held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.chaos.parts import Parts, router, running, worker
from tests.chaos.proxy import ChaosProxy, Proxies
from tests.chaos.table import Table
from tests.chaos.traffic import References, references, traffic
from tests.processes.cluster import free_port

HOLDS_S = 5.0  # longer than a router waits for a worker's word, shorter than a lease
LINKS = ["router-prefill", "router-decode", "prefill-decode"]


@dataclass
class Rig:
    cluster: Parts
    proxies: Proxies
    links: dict[str, ChaosProxy]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One prefill and one decode worker; every connection between the three goes through a proxy of its own."""
    ports, proxies = [free_port() for _ in range(3)], Proxies()
    p, d = (f"127.0.0.1:{port}" for port in ports[:2])
    links = dict(zip(LINKS, (proxies.add("127.0.0.1", ports[n]) for n in (0, 1, 1)), strict=True))
    at = {name: f"127.0.0.1:{proxy.port}" for name, proxy in links.items()}
    parts = [
        worker("prefill-0", "prefill", p),
        worker("decode-0", "decode", d, "--advertise", at["prefill-decode"]),
        router({"prefill-0": at["router-prefill"], "decode-0": at["router-decode"]}, "127.0.0.1", ports[2]),
    ]
    try:
        with running(Parts(f"http://127.0.0.1:{ports[2]}", parts), workers=2) as cluster:
            yield Rig(cluster, proxies, links)
    finally:
        proxies.close()


@pytest.fixture(scope="module")
def right(rig: Rig) -> References:
    return asyncio.run(references(rig.cluster))


Fault = Callable[[Proxies, ChaosProxy], None]


def cut(proxies: Proxies, link: ChaosProxy) -> None:
    proxies.cut(link)


def reset_and_refuse(proxies: Proxies, link: ChaosProxy) -> None:
    link.refuses = True
    proxies.cut(link, reset=True)


def swallow_up(proxies: Proxies, link: ChaosProxy) -> None:
    link.up.swallows = True


def swallow_down(proxies: Proxies, link: ChaosProxy) -> None:
    link.down.swallows = True


def swallow_both(proxies: Proxies, link: ChaosProxy) -> None:
    link.up.swallows = link.down.swallows = True


def stall(proxies: Proxies, link: ChaosProxy) -> None:
    link.up.stalls = link.down.stalls = True


def throttle(proxies: Proxies, link: ChaosProxy) -> None:
    link.up.bytes_per_s = link.down.bytes_per_s = 20_000


def delay(proxies: Proxies, link: ChaosProxy) -> None:
    link.up.delay_s = link.down.delay_s = 0.2


FAULTS: dict[str, Fault] = {
    "cut": cut,
    "reset, then refused": reset_and_refuse,
    "half-open, forth": swallow_up,
    "half-open, back": swallow_down,
    "half-open, both": swallow_both,
    "stalled": stall,
    "throttled": throttle,
    "delayed": delay,
}
QUICK = {("half-open, forth", "router-decode"), ("reset, then refused", "prefill-decode")}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_link_goes_bad(
    rig: Rig, right: References, table: Table, chaos_full: bool, fault: str, link: str
) -> None:
    if not chaos_full and (fault, link) not in QUICK:
        pytest.skip("only with --chaos-full")
    row = table.row(f"connection {fault}", f"{link}, gRPC over TCP")
    async with traffic(rig.cluster, right, f"{fault} {link}") as load:
        load.send()
        await load.is_streaming()
        try:
            FAULTS[fault](rig.proxies, rig.links[link])
            await load.go_on(HOLDS_S)
        finally:
            rig.proxies.heal()
        await load.recovers(row)
        await load.end(row)
    await asyncio.to_thread(rig.cluster.quiesce, 2)
