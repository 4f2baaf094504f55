"""A Baton on one machine, over TCP: every connection between router, P and D goes through a chaos proxy of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.chaos.parts import Parts, router, running, worker
from tests.chaos.proxy import ChaosProxy, Proxies
from tests.processes.cluster import free_port

LINKS = ["router-prefill", "router-decode", "prefill-decode"]


@dataclass
class Rig:
    cluster: Parts
    proxies: Proxies
    links: dict[str, ChaosProxy]


def no_flags(role: str) -> Sequence[str]:
    return ()


@contextmanager
def proxied(flags: Callable[[str], Sequence[str]] = no_flags) -> Iterator[Rig]:
    """`flags`: more flags of each role's process."""
    ports, proxies = [free_port() for _ in range(3)], Proxies()
    p, d = (f"127.0.0.1:{port}" for port in ports[:2])
    links = dict(zip(LINKS, (proxies.add("127.0.0.1", ports[n]) for n in (0, 1, 1)), strict=True))
    at = {name: f"127.0.0.1:{proxy.port}" for name, proxy in links.items()}
    dialled = {"prefill-0": at["router-prefill"], "decode-0": at["router-decode"]}
    parts = [
        worker("prefill-0", "prefill", p, *flags("prefill")),
        worker("decode-0", "decode", d, "--advertise", at["prefill-decode"], *flags("decode")),
        router(dialled, "127.0.0.1", ports[2], *flags("router")),
    ]
    try:
        with running(Parts(f"http://127.0.0.1:{ports[2]}", parts), workers=2) as cluster:
            yield Rig(cluster, proxies, links)
    finally:
        proxies.close()
