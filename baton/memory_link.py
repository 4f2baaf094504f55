"""A router's link to a worker of the same process: what `router.client` and `session.server` are over gRPC.

For simulation and tests. Messages take their time, in order; a worker that is killed is noticed after a while, and
one that is stopped (as by SIGSTOP) says nothing until it goes on, and then everything that it had to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from core.clock import Clock
from core.messages import Cancel, Lend, RequestFailed, Submit, TokenBatch
from kvtransfer.chores import Chores
from router.workers import Workers
from session.desk import Desk
from session.feed import Feed

FEED_S = 0.05


class MemoryLink:
    """A router.workers.Link."""

    def __init__(
        self, router: str, workers: Workers, desk: Desk, clock: Clock, random: Random, *, delay_s: float = 0.0005
    ) -> None:
        self._router = router
        self._workers = workers
        self._desk = desk
        self._clock = clock
        self._random = random
        self._delay_s = delay_s
        self._chores = Chores()
        self._due_s = [0.0, 0.0]  # when the last message down and up arrives: they stay in order
        self._feed = Feed(desk.tier.page_snapshot(), clock)
        self._alive = True

    def start(self) -> None:
        self._chores.spawn(self._pump(), "link")
        self._chores.every(FEED_S, self._poll, "feed")
        self._workers.up(self._desk.tier.info, self)

    async def kill(self, noticed_s: float) -> None:
        """The worker has died. The router hears of it when its session has not come back."""
        self._alive = False
        await self._chores.stop()
        asyncio.get_running_loop().call_later(noticed_s, self._workers.down, self._desk.tier.info.worker)

    async def stop(self) -> None:
        self._alive = False
        await self._chores.stop()

    def publish(self) -> None:
        """The tier's prefix cache has changed, perhaps."""
        change = self._desk.tier.page_changes()
        if change is not None:
            self._feed.changed(change)

    def submit(self, submit: Submit) -> None:
        self._later(0, lambda: self._desk.submit(self._router, submit))

    def cancel(self, cancel: Cancel) -> None:
        self._later(0, lambda: self._desk.cancel(cancel))

    def lend(self, lend: Lend) -> None:
        self._later(0, lambda: self._desk.lend(lend))

    async def _pump(self) -> None:
        queue = self._desk.open(self._router, {})
        while (message := await queue.messages.get()) is not None:
            self._later(1, lambda message=message: self._take(message))  # type: ignore[misc]

    def _take(self, message: TokenBatch | RequestFailed) -> None:
        worker = self._desk.tier.info.worker
        if isinstance(message, TokenBatch):
            self._workers.on_batch(worker, message)
        else:
            self._workers.on_failed(worker, message)

    def _poll(self) -> None:
        worker = self._desk.tier.info.worker
        if self._feed.overflowed:
            self._feed.replace(self._desk.tier.page_snapshot())
        for event in self._feed.due(self._desk.tier.load()):
            take = self._workers.on_pages if hasattr(event, "number") else self._workers.on_load
            self._later(1, lambda take=take, event=event: take(worker, event))  # type: ignore[misc]

    def _later(self, way: int, do: Callable[[], object]) -> None:
        """Deliver after a delay, unless the worker has died meanwhile."""
        loop = asyncio.get_running_loop()
        self._due_s[way] = max(loop.time() + self._random.uniform(0, 2) * self._delay_s, self._due_s[way] + 1e-9)
        loop.call_at(self._due_s[way], lambda: do() if self._alive else None)
