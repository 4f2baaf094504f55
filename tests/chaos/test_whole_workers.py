"""Workers of `baton serve --transport ucx`, killed and stopped while hand-offs are in each state.

Every request ends right or with one clear error, the worker is there again soon, and every page is accounted for.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from random import Random

import pytest

from tests.chaos.table import Table
from tests.chaos.traffic import References, Traffic, references, traffic
from tests.chaos.transports import skip_without_ucx
from tests.processes.cluster import Cluster, serving

P, D = "prefill-0", "decode-0"
STOPPED_S = 4.0  # longer than a router waits for a worker's word
QUICK = {("streaming", P, "SIGKILL")}
MOMENTS_S = 1.5  # the hand-offs of one load take about so long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    skip_without_ucx()
    with serving("--transport", "ucx", "--step-tokens", "32") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def right(cluster: Cluster) -> References:
    return asyncio.run(references(cluster))


def in_state(cluster: Cluster, worker: str, state: str) -> bool:
    """D grants at once when P asks, and P asks when a request's turn has come: those before are queued at P."""
    if (worker, state) == (P, "queued"):
        return cluster.metric("vllm:num_requests_waiting")[P][P] >= 1
    return cluster.metric("baton:handoffs_in_flight", "state")[worker][state] >= 1


async def reach(cluster: Cluster, victim: str, state: str) -> None:
    """Return when the victim has a hand-off in this state.

    Sealed is over too soon to be seen. So D is stopped while pages come, and P goes on until it has sealed.
    """
    if state == "sealed":
        await reach(cluster, P, "streaming")
        cluster.send(D, signal.SIGSTOP)
        victim = P
    await asyncio.to_thread(cluster.wait_until, f"{victim} has {state}", lambda: in_state(cluster, victim, state))


async def hurt(cluster: Cluster, load: Traffic, victim: str, what: signal.Signals) -> None:
    """A worker that is killed is started again by the launcher, one that is stopped goes on after a while."""
    process = cluster.send(victim, what)
    try:
        await load.go_on(STOPPED_S)
    finally:
        for name in {P, D} - ({victim} if what is signal.SIGKILL else set()):
            cluster.send(name, signal.SIGCONT)
    if what is signal.SIGKILL:
        is_back: Callable[[], bool] = lambda: cluster.replaced(process, victim)  # noqa: E731
        await asyncio.to_thread(cluster.wait_until, f"{victim} has been started again", is_back)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [P, D])
@pytest.mark.parametrize("state", ["queued", "streaming", "sealed"])
async def test_a_worker_is_lost_in_a_state(
    cluster: Cluster, right: References, table: Table, chaos_full: bool, state: str, victim: str, what: signal.Signals
) -> None:
    if not chaos_full and (state, victim, what.name) not in QUICK:
        pytest.skip("only with --chaos-full")
    row = table.row(f"{what.name} of a {victim.partition('-')[0]} worker", "`baton serve --transport ucx`, each state")
    async with traffic(cluster, right, f"{state} {victim} {what.name}") as load:
        for _ in range(4 if state == "queued" else 1):
            load.send()
        await reach(cluster, victim, state)
        await hurt(cluster, load, victim, what)
        await load.recovers(row)
        await load.end(row)
    await asyncio.to_thread(cluster.quiesce, 2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", range(4))
async def test_a_worker_is_killed_at_any_moment(
    cluster: Cluster, right: References, table: Table, chaos_full: bool, number: int
) -> None:
    if not chaos_full:
        pytest.skip("only with --chaos-full")
    victim = (P, D)[number % 2]
    row = table.row(f"SIGKILL of a {victim.partition('-')[0]} worker", "`baton serve --transport ucx`, any moment")
    async with traffic(cluster, right, f"moment {number}") as load:
        load.send()
        await asyncio.sleep(Random(number).uniform(0.0, MOMENTS_S))
        await hurt(cluster, load, victim, signal.SIGKILL)
        await load.recovers(row)
        await load.end(row)
    await asyncio.to_thread(cluster.quiesce, 2)
