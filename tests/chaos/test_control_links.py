"""The connections between router, prefill and decode worker go bad under load; the bytes of pages have another way.

Every request ends right or with one clear error, the next ones are served soon after, and nothing is left held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from tests.chaos.proxied import LINKS, Rig, proxied
from tests.chaos.proxy import ChaosProxy, Proxies
from tests.chaos.table import Table
from tests.chaos.traffic import References, references, traffic

HOLDS_S = 5.0  # longer than a router waits for a worker's word, shorter than a lease

@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with proxied() as rig:
        yield rig


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
