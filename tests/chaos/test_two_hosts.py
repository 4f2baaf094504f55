"""Workers on two hosts, pages over UCX between them; the links are cut, throttled, made half dead, and restored.

Under streaming load every request ends right or with one clear error, the next ones are served soon after the
restore, and every page is accounted for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from core.errors import DigestMismatch
from tests.chaos.netns import D_END, LINKS, P_END, ROUTER_ADDRESS, Hosts, two_hosts
from tests.chaos.parts import Parts, router, running, worker
from tests.chaos.table import Table
from tests.chaos.traffic import References, references, traffic
from tests.chaos.transports import skip_without_ucx

PORT, ROUTER_PORT = 7001, 8000
SHORT_S, LONG_S = 5.0, 14.0  # below and above the life of a lease


@dataclass
class Rig:
    cluster: Parts
    hosts: Hosts


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """P on one host, D and the router on the other."""
    skip_without_ucx()
    with two_hosts() as hosts:
        on_p, on_d = (("ip", "netns", "exec", host) for host in (hosts.p, hosts.d))
        addresses = {"prefill-0": f"{LINKS['control']}{P_END}:{PORT}", "decode-0": f"127.0.0.1:{PORT}"}
        ucx = ("--transport", "ucx", "--ucx-tls", "tcp", "--ucx-net-devices", "data")
        p, d = (f"{LINKS['data']}{end}" for end in (P_END, D_END))
        parts = [
            worker("prefill-0", "prefill", f"0.0.0.0:{PORT}", "--advertise", f"{p}:{PORT}", *ucx, prefix=on_p),
            worker("decode-0", "decode", f"0.0.0.0:{PORT}", "--advertise", f"{d}:{PORT}", *ucx, prefix=on_d),
            router(addresses, ROUTER_ADDRESS, ROUTER_PORT, prefix=on_d),
        ]
        with running(Parts(f"http://{ROUTER_ADDRESS}:{ROUTER_PORT}", parts), workers=2) as cluster:
            yield Rig(cluster, hosts)


@pytest.fixture(scope="module")
def right(rig: Rig) -> References:
    return asyncio.run(references(rig.cluster))


Fault = Callable[[Hosts], object]

FAULTS: dict[str, tuple[Fault, float]] = {
    "data link cut": (lambda hosts: hosts.cut("data"), SHORT_S),
    "control link cut": (lambda hosts: hosts.cut("control"), SHORT_S),
    "both links cut": (lambda hosts: hosts.cut(*LINKS), SHORT_S),
    "data link cut for longer than a lease": (lambda hosts: hosts.cut("data"), LONG_S),
    "both links cut for longer than a lease": (lambda hosts: hosts.cut(*LINKS), LONG_S),
    "data link half-open, P mute": (lambda hosts: hosts.mute(hosts.p, "data"), SHORT_S),
    "data link half-open, D mute": (lambda hosts: hosts.mute(hosts.d, "data"), SHORT_S),
    "both links half-open, P mute": (lambda hosts: hosts.mute(hosts.p, *LINKS), LONG_S),
    "data link throttled to 2 Mbit/s": (lambda hosts: hosts.throttle("2mbit", "data"), SHORT_S),
    "both links throttled to 2 Mbit/s": (lambda hosts: hosts.throttle("2mbit", *LINKS), SHORT_S),
    "packets lost, repeated and swapped": (lambda hosts: hosts.harm(lose=0.01, repeat=0.02, swap=0.02), SHORT_S),
}
QUICK = {"data link cut", "data link half-open, P mute"}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", FAULTS)
async def test_the_links_between_two_hosts_go_bad(
    rig: Rig, right: References, table: Table, chaos_full: bool, fault: str
) -> None:
    if not chaos_full and fault not in QUICK:
        pytest.skip("only with --chaos-full")
    row = table.row(fault, "between two network namespaces, UCX and gRPC over TCP")
    harm, holds_s = FAULTS[fault]
    async with traffic(rig.cluster, right, fault) as load:
        load.send()
        await load.is_streaming()
        try:
            await asyncio.to_thread(harm, rig.hosts)
            await load.go_on(holds_s)
        finally:
            await asyncio.to_thread(rig.hosts.heal)
        await load.recovers(row)
        await load.end(row)
    await asyncio.to_thread(rig.cluster.quiesce, 2)


@pytest.mark.timeout(240)
async def test_bits_of_pages_are_flipped_on_the_wire(rig: Rig, right: References, table: Table) -> None:
    """Behind the checksums of TCP: nothing but the digests can find them."""
    row = table.row("bits of pages flipped on the wire", "between two network namespaces, under TCP")
    before, found_before = rig.hosts.harm(), mismatches(rig.cluster)
    async with traffic(rig.cluster, right, "flipped") as load:
        rig.hosts.harm(flip=0.02, spared_port=PORT)
        try:
            load.send()
            await load.go_on(SHORT_S)
            await load.end(row)
        finally:
            rig.hosts.heal()
        await load.recovers(row)
    await asyncio.to_thread(rig.cluster.quiesce, 2)
    flipped = rig.hosts.harm().get("flipped", 0) - before.get("flipped", 0)
    found = mismatches(rig.cluster) - found_before
    print(f"{flipped} packets with a flipped bit, {found} pages refused")
    assert 0 < found <= flipped
    assert found >= flipped / 4  # several of them may lie in one page, or in one that was given up


def mismatches(cluster: Parts) -> int:
    return int(cluster.total("baton:handoff_faults_total", "code", DigestMismatch.code))
