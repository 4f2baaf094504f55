"""Bits are flipped on the connections between router and workers, under mutual TLS: no message is taken for another.

Without TLS nothing but TCP's own checksum guards what is not a page: the ids of a prompt, a token on its way back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority

from tests.chaos.proxied import LINKS, Rig, proxied
from tests.chaos.table import Table
from tests.chaos.traffic import References, references, traffic

HOLDS_S = 5.0
SHARE = 0.01  # of the pieces, a bit is flipped


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    authority = Authority(tmp_path_factory.mktemp("certificates"))

    def flags(role: str) -> list[str]:
        certificate, key = map(Path, authority.issue(role))
        return [f"--tls-cert={certificate}", f"--tls-key={key}", f"--tls-ca={authority.certificate}"]

    with proxied(flags) as rig:
        yield rig


@pytest.fixture(scope="module")
def right(rig: Rig) -> References:
    return asyncio.run(references(rig.cluster))


@pytest.mark.timeout(240)
async def test_bits_are_flipped_on_every_connection(
    rig: Rig, right: References, table: Table, chaos_full: bool
) -> None:
    if not chaos_full:
        pytest.skip("only with --chaos-full")
    row = table.row("bits flipped, mutual TLS", "router-prefill, router-decode, prefill-decode: gRPC over TCP")
    async with traffic(rig.cluster, right, "flipped") as load:
        load.send()
        await load.is_streaming()
        ways = [way for link in LINKS for way in (rig.links[link].up, rig.links[link].down)]
        for way in ways:
            way.flip_share = SHARE
        try:
            await load.go_on(HOLDS_S)
        finally:
            rig.proxies.heal()
        assert sum(way.flipped for way in ways) >= 5
        await load.recovers(row)
        await load.end(row)
    await asyncio.to_thread(rig.cluster.quiesce, 2)
