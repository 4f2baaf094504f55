"""Every kind of fault, each as something that happens to a cluster at some moment and is over after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random

from kvtransfer.memory import Mischief
from kvtransfer.session_memory import Weather
from tests.simulation.cluster import SimCluster, SimWorker

STORM = Weather(lose=0.05, double=0.1, overtake=0.1, cut=0.02)
LONGEST_S = 12.0  # of a stop or a partition: longer than any lease


@dataclass(frozen=True, slots=True)
class Fault:
    where: str  # for the table
    strike: Callable[[SimCluster, Random], Awaitable[bool]]  # False: there was nothing to strike


def _pick(cluster: SimCluster, rng: Random, tier: str) -> SimWorker | None:
    """A living worker of the tier that does something, if there is one."""
    living = [w for name, w in cluster.alive.items() if name.startswith(tier) and not w.dead and not w.node.stopped]
    busy = [worker for worker in living if worker.busy]
    return rng.choice(busy or living) if living else None


def _length_s(rng: Random) -> float:
    """Short ones are as likely as long ones."""
    return rng.choice([rng.uniform(0.01, 0.5), rng.uniform(0.5, 4.0), rng.uniform(4.0, LONGEST_S)])


def _kill(tier: str) -> Callable[[SimCluster, Random], Awaitable[bool]]:
    async def strike(cluster: SimCluster, rng: Random) -> bool:
        worker = _pick(cluster, rng, tier)
        if worker is None:
            return False
        await cluster.crash(worker.id.name, rng.uniform(0.2, 4.0))
        return True

    return strike


async def _kill_router(cluster: SimCluster, rng: Random) -> bool:
    living = [index for index, router in enumerate(cluster.routers) if not router.dead]
    if not living:
        return False
    await cluster.crash_router(rng.choice(living), rng.uniform(0.2, 3.0))
    return True


def _stop(tier: str) -> Callable[[SimCluster, Random], Awaitable[bool]]:
    async def strike(cluster: SimCluster, rng: Random) -> bool:
        worker = _pick(cluster, rng, tier)
        if worker is None:
            return False
        worker.node.stop()
        await asyncio.sleep(_length_s(rng))
        worker.node.wake()
        return True

    return strike


async def _cut_pairs(cluster: SimCluster, rng: Random) -> bool:
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    if worker is None:
        return False
    for _ in range(rng.randrange(1, 4)):
        for other in list(cluster.alive.values()):
            cluster.network.cut(worker.id, other.id)
            cluster.network.cut(other.id, worker.id)
        await asyncio.sleep(rng.uniform(0.0, 0.3))
    return True


async def _cut_links(cluster: SimCluster, rng: Random) -> bool:
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    if worker is None:
        return False
    for _ in range(rng.randrange(1, 4)):
        for router in cluster.routers:
            if worker.id.name in router.links:
                router.links[worker.id.name].cut()
        await asyncio.sleep(rng.uniform(0.0, 0.3))
    return True


async def _part_pair(cluster: SimCluster, rng: Random) -> bool:
    p, d = _pick(cluster, rng, "prefill"), _pick(cluster, rng, "decode")
    if p is None or d is None:
        return False
    await _part(cluster, p.id.name, d.id.name, _length_s(rng))
    return True


async def _part_router(cluster: SimCluster, rng: Random) -> bool:
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    router = rng.choice(cluster.routers)
    if worker is None or router.dead:
        return False
    await _part(cluster, router.name, worker.id.name, _length_s(rng))
    return True


async def _part(cluster: SimCluster, one: str, other: str, length_s: float) -> None:
    cluster.parting.part(one, other)
    try:
        await asyncio.sleep(length_s)
    finally:
        cluster.parting.heal(one, other)


async def _storm(cluster: SimCluster, rng: Random) -> bool:
    before, cluster.network.weather = cluster.network.weather, STORM
    await asyncio.sleep(rng.uniform(0.3, 3.0))
    cluster.network.weather = before
    return True


def _mischief(**shares: float) -> Callable[[SimCluster, Random], Awaitable[bool]]:
    async def strike(cluster: SimCluster, rng: Random) -> bool:
        for name, share in shares.items():
            cluster.fabric.mischief = replace(cluster.fabric.mischief, **{name: share})  # type: ignore[arg-type]
        await asyncio.sleep(rng.uniform(0.3, 3.0))
        for name in shares:
            calm = {name: getattr(Mischief(), name)}
            cluster.fabric.mischief = replace(cluster.fabric.mischief, **calm)
        return True

    return strike


async def _leave(cluster: SimCluster, rng: Random) -> bool:
    """Some clients go away."""
    clients = [task for router in cluster.routers if not router.dead for task in router.clients]
    clients.sort(key=lambda task: task.get_name())
    for task in rng.sample(clients, min(3, len(clients))):
        task.cancel()
        await asyncio.sleep(rng.uniform(0.0, 0.1))
    return bool(clients)


async def _pressure(cluster: SimCluster, rng: Random) -> bool:
    """Somebody else takes most of a pool for a while."""
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    if worker is None:
        return False
    pool = worker.worker.pool
    taken = pool.allocate(int(pool.reusable * rng.uniform(0.6, 1.0))) or []
    await asyncio.sleep(rng.uniform(0.2, 4.0))
    if not worker.dead:
        pool.release_all(taken)
    return True


async def _drain(cluster: SimCluster, rng: Random) -> bool:
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    if worker is None:
        return False
    await cluster.drain(worker.id.name, rng.choice([rng.uniform(0.1, 2.0), rng.uniform(2.0, 8.0), 30.0]))
    return True


async def _clock(cluster: SimCluster, rng: Random) -> bool:
    worker = _pick(cluster, rng, rng.choice(["prefill", "decode"]))
    if worker is None:
        return False
    worker.node.offset_s += rng.choice([rng.uniform(0.5, 5.0), rng.uniform(5.0, 40.0)])
    return True


FAULTS: dict[str, Fault] = {
    "kill prefill": Fault("a prefill worker, SIGKILL, started again", _kill("prefill")),
    "kill decode": Fault("a decode worker, SIGKILL, started again", _kill("decode")),
    "kill router": Fault("one of two routers, SIGKILL, started again", _kill_router),
    "stop prefill": Fault("a prefill worker, SIGSTOP for up to 12 s", _stop("prefill")),
    "stop decode": Fault("a decode worker, SIGSTOP for up to 12 s", _stop("decode")),
    "break pair sessions": Fault("all sessions of a worker with its peers, up to three times", _cut_pairs),
    "break router links": Fault("all sessions of a worker with the routers, up to three times", _cut_links),
    "part a pair": Fault("between a prefill and a decode worker, up to 12 s", _part_pair),
    "part router and worker": Fault("between a router and a worker, up to 12 s", _part_router),
    "lose, double, reorder": Fault("messages between workers, up to 3 s", _storm),
    "flip bits": Fault("one in ten pages on its way, up to 3 s", _mischief(corrupt=0.1)),
    "stale pages": Fault("one in ten pages is another's, up to 3 s", _mischief(stale=0.1)),
    "hung fetches": Fault("one fetch in ten never ends", _mischief(hang=0.1)),
    "clients leave": Fault("three clients go away", _leave),
    "pool too small": Fault("most of a worker's free pages are taken, up to 4 s", _pressure),
    "drain": Fault("a worker under load, within 0.1 to 30 s; what is left is handed back", _drain),
    "clock jump": Fault("a worker's clock, forward by up to 40 s", _clock),
}
