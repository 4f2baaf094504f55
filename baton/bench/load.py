"""When each request is sent: as soon as another has ended (closed loop), or when its time has come (open loop)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def closed_loop(send: Callable[[T], Awaitable[R]], work: Sequence[T], concurrency: int) -> list[R]:
    """Keeps `concurrency` requests under way until all are done. Results stand in the order of `work`."""
    results: dict[int, R] = {}
    waiting = iter(enumerate(work))

    async def sender() -> None:
        for index, item in waiting:
            results[index] = await send(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(work))):
            group.create_task(sender())
    return [results[index] for index in range(len(work))]


async def open_loop(send: Callable[[T], Awaitable[R]], work: Sequence[T], due_s: Sequence[float]) -> list[R]:
    """Sends each request at its time, in seconds from now, however many are still under way."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    tasks: list[asyncio.Task[R]] = []

    async def send_one(item: T) -> R:
        return await send(item)

    async with asyncio.TaskGroup() as group:
        for item, due in zip(work, due_s, strict=True):
            await asyncio.sleep(start_s + due - loop.time())
            tasks.append(group.create_task(send_one(item)))
    return [task.result() for task in tasks]


def poisson_times_s(rate_per_s: float, count: int, rng: random.Random) -> list[float]:
    """When each of `count` requests is due: exponential gaps, the first at once.

    The times are stretched so that the mean gap is 1 / rate: the load offered is the one that was asked for, and not
    that of one draw of it.
    """
    gaps = [rng.expovariate(rate_per_s) for _ in range(count - 1)]
    stretch = (count - 1) / rate_per_s / sum(gaps) if gaps else 1.0
    return [0.0, *(time_s * stretch for time_s in accumulate(gaps))][:count]
