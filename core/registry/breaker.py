"""Keeps a slow or absent store from costing anybody time: a limit per call, and after some failures no calls at all.

closed --three failures--> open (calls fail at once) --pause--> one call is let through --> closed, or open longer
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from core.clock import Clock
from core.errors import RegistryAway
from core.registry.store import Store

T = TypeVar("T")

FAILURES = 3  # in a row, until the breaker opens
PAUSE_S = (0.5, 8.0)  # first and longest time that it stays open


class Breaker:
    """Pure: told the time and what became of each call."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = PAUSE_S[0]
        self._until_s: float | None = None  # None: closed

    @property
    def is_open(self) -> bool:
        return self._until_s is not None

    def admits(self, now_s: float) -> bool:
        """Whether a call may be made now. Of an open breaker, one call after each pause is the trial."""
        if self._until_s is None:
            return True
        if now_s < self._until_s:
            return False
        self._until_s = now_s + self._pause_s  # others wait for the outcome of this one
        return True

    def succeeded(self) -> None:
        self._failures, self._pause_s, self._until_s = 0, PAUSE_S[0], None

    def failed(self, now_s: float) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            self._until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, PAUSE_S[1])


OUTCOMES = ("ok", "failed", "late", "refused")  # refused: by the breaker, without a call


def _uncounted(outcome: str) -> None:
    """Nobody counts."""


class GuardedStore:
    """A Store in front of another. `timeout_s` bounds each call; listening is bounded only in how soon it begins.

    `on_call` is told the outcome of each call, one of OUTCOMES.
    """

    def __init__(
        self, store: Store, clock: Clock, timeout_s: float = 0.1, on_call: Callable[[str], None] = _uncounted
    ) -> None:
        self.on_call = on_call
        self._store = store
        self._clock = clock
        self._timeout_s = timeout_s
        self._breaker = Breaker()

    @property
    def is_away(self) -> bool:
        """Calls fail at once."""
        return self._breaker.is_open

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        await self._call(self._store.put(group, name, value, life_s))

    async def remove(self, group: str, name: str) -> None:
        await self._call(self._store.remove(group, name))

    async def read(self, group: str) -> dict[str, bytes]:
        return await self._call(self._store.read(group))

    async def add(self, counter: str, amount: int, life_s: float) -> int:
        return await self._call(self._store.add(counter, amount, life_s))

    async def tell(self, group: str) -> None:
        await self._call(self._store.tell(group))

    async def listen(self, group: str) -> AsyncIterator[None]:
        async with aclosing(self._store.listen(group)) as changes:  # type: ignore[type-var]
            await self._call(anext(changes))
            yield
            async for _ in changes:
                yield

    async def close(self) -> None:
        await self._store.close()

    async def _call(self, call: Awaitable[T]) -> T:
        """Raises RegistryAway at once while the breaker is open, else within `timeout_s`."""
        if not self._breaker.admits(self._clock()):
            _drop(call)
            self.on_call("refused")
            raise RegistryAway("the store has failed, and is left alone for a moment")
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await call
        except TimeoutError:
            self._breaker.failed(self._clock())
            self.on_call("late")
            raise RegistryAway(f"the store did not answer within {self._timeout_s * 1000:.0f} ms") from None
        except RegistryAway:
            self._breaker.failed(self._clock())
            self.on_call("failed")
            raise
        self._breaker.succeeded()
        self.on_call("ok")
        return result


def _drop(call: Awaitable[T]) -> None:
    """A coroutine that is never awaited warns unless it is closed."""
    close = getattr(call, "close", None)
    if close is not None:
        close()
