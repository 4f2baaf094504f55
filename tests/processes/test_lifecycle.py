"""From the command to `ready:`, and to the end, however it comes: in time, with a word to each client, nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import pytest

from tests.processes.answers import Answer
from tests.processes.cluster import STOP_S, Cluster, started
from tests.processes.load import LONG, STREAMED, Load, tokens_of

WARM_START_S = 15.0
CHILDREN_S = 8.0  # without their launcher children end by themselves, or are gone after a grace of some seconds


def answer_nobody_knows() -> dict[str, Answer]:
    """References for requests whose end is all that counts."""
    return {str(request): Answer() for request in STREAMED + LONG}


async def under_load(cluster: Cluster, end: signal.Signals) -> tuple[float, list[Answer | BaseException]]:
    """Signal the launcher while clients are served. Returns when, and what each client got."""
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        load = Load(client, "end", answer_nobody_knows())
        await tokens_of(load.send(STREAMED), 5)
        load.send(LONG)
        sent_s = time.monotonic()
        cluster.launcher.send_signal(end)
        return sent_s, await asyncio.gather(*(asked.task for asked in load.asked), return_exceptions=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_in_time_and_tells_every_client(number: signal.Signals) -> None:
    with started("--step-tokens", "32") as cluster:
        sent_s, ends = asyncio.run(under_load(cluster, number))
        assert cluster.launcher.wait(60) == 0, cluster.said()
        took_s = time.monotonic() - sent_s
        cluster.assert_nothing_left()
    assert took_s < STOP_S
    for end in ends:
        assert isinstance(end, Answer), f"{end!r}: a client was cut off without a word"
        assert end.is_done or end.error is not None


def test_nothing_survives_a_launcher_that_was_killed() -> None:
    with started("--step-tokens", "32") as cluster:
        children = cluster.processes()
        assert len(children) == 4, "the launcher, the router and two workers"
        _, ends = asyncio.run(under_load(cluster, signal.SIGKILL))
        assert len(ends) == len(STREAMED + LONG)
        cluster.wait_until("every child has ended", lambda: not cluster.processes(), CHILDREN_S)
        cluster.assert_nothing_left()


def test_a_warm_start_is_quick(disaggregated: Cluster) -> None:
    """What it reads is in the page cache since the other cluster began. On a busy machine the time is only shown."""
    began_s = time.monotonic()
    with started() as cluster:
        took_s = time.monotonic() - began_s
        assert cluster.is_healthy()
        cluster.stop()
    busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
    print(f"ready after {took_s:.1f} s" + " on a busy machine" * busy)
    assert busy or took_s < WARM_START_S
