"""Who gets in: bounds on the requests in flight and on the prompt tokens that wait for their first token.

What is over a bound is refused with 429 and a Retry-After; nothing queues here without an end. A router alone refuses
at once. Where several routers share the bounds, each has a part (core.registry.quota): a request that finds too
little of it waits up to WAIT_S for the part to grow or for others to leave, and is refused then; while the store is
away parts cannot grow, and it is refused at once. Nothing here asks the store: parts are kept by loops of their own.
Before the store was ever reached, a router admits START of each bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from core.clock import Clock
from core.errors import QueueFull
from router.limits import Limits

MAX_RETRY_AFTER_S = 60.0
RATE_WEIGHT = 0.1  # of the newest departure in the moving mean
WAIT_S = 0.5
MAX_WAITING = 1024  # calls that wait for a part to grow
START = 1 / 16


class Part(Protocol):
    """core.registry.quota.Quota: how much of a shared bound is ours. `grown` is called when it has become more."""

    grown: Callable[[], None]

    @property
    def held(self) -> int: ...

    @property
    def is_away(self) -> bool: ...

    @property
    def was_heard(self) -> bool: ...

    def use(self, used: int, waiting: int = 0) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """None: the whole bound is ours."""

    requests: Part | None = None
    queued_tokens: Part | None = None


class _Bound:
    """One bound: what is used of it, and whether more fits."""

    def __init__(self, limit: int, part: Part | None) -> None:
        self.used = 0
        self._limit = limit
        self._part = part
        self._waiting = 0

    def fits(self, more: int) -> bool:
        """One that is too large for the whole bound is let in when nothing else is there."""
        if self._part is None:
            return not self.used or self.used + more <= self._limit
        held = self._part.held if self._part.was_heard else max(1, int(self._limit * START))
        needed = self.used + more if self.used else min(more, self._limit)
        return needed <= held

    @property
    def may_grow(self) -> bool:
        return self._part is not None and not self._part.is_away

    def take(self, more: int) -> None:
        self.used += more
        self._tell()

    def wait(self, more: int) -> None:
        self._waiting += more
        self._tell()

    def _tell(self) -> None:
        if self._part is not None:
            self._part.use(self.used, self._waiting)


class Admission:
    """Counts what is inside. `retry_after_s` comes from the recent time between departures."""

    def __init__(self, limits: Limits, clock: Clock, parts: Parts | None = None) -> None:
        parts = parts or Parts()
        self._requests = _Bound(limits.max_requests, parts.requests)
        self._tokens = _Bound(limits.max_queued_tokens, parts.queued_tokens)
        self._clock = clock
        self._gap_s = 0.0
        self._last_departure: float | None = None
        self._waiting = 0
        self._room = asyncio.Event()
        for part in (parts.requests, parts.queued_tokens):
            if part is not None:
                part.grown = self.look_again

    @property
    def requests(self) -> int:
        return self._requests.used

    @property
    def queued_tokens(self) -> int:
        return self._tokens.used

    async def admit(self, choices: int) -> Slot:
        """Raises QueueFull. A request that is too large for the bound alone is let in when nothing else is there."""
        await self._take(self._requests, choices, "too many requests are in flight")
        return Slot(self, choices)

    async def queue(self, tokens: int) -> None:
        """These prompt tokens wait. Raises QueueFull when they cannot be queued now."""
        await self._take(self._tokens, tokens, "too many prompt tokens are waiting")

    def started(self, tokens: int) -> None:
        """They wait no longer."""
        self._tokens.take(-tokens)
        self.look_again()

    def departed(self, choices: int) -> None:
        self._requests.take(-choices)
        now = self._clock()
        if self._last_departure is not None:
            gap_s = min(now - self._last_departure, MAX_RETRY_AFTER_S)
            self._gap_s += RATE_WEIGHT * (gap_s - self._gap_s)
        self._last_departure = now
        self.look_again()

    def look_again(self) -> None:
        """A part has grown, or somebody has left."""
        self._room.set()
        self._room = asyncio.Event()

    async def _take(self, bound: _Bound, more: int, why: str) -> None:
        if not bound.fits(more):
            if not bound.may_grow or self._waiting >= MAX_WAITING:
                bound.wait(more)  # so that the part grows for the next one
                bound.wait(-more)
                raise self._full(why)
            await self._until_fits(bound, more, why)
        bound.take(more)

    async def _until_fits(self, bound: _Bound, more: int, why: str) -> None:
        self._waiting += 1
        bound.wait(more)
        try:
            async with asyncio.timeout(WAIT_S):
                while not bound.fits(more):
                    await self._room.wait()
        except TimeoutError:
            raise self._full(why) from None
        finally:
            self._waiting -= 1
            bound.wait(-more)

    def _full(self, why: str) -> QueueFull:
        return QueueFull(f"{why}; try again later", retry_after_s=min(max(self._gap_s, 1.0), MAX_RETRY_AFTER_S))


class Slot:
    """One admitted call: what it holds of the bounds, given back on leaving. It is entered at once."""

    def __init__(self, admission: Admission, choices: int) -> None:
        self._admission = admission
        self._choices = choices
        self._tokens: list[int] = []  # by request: prompt tokens that still wait

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.started(sum(self._tokens))
        self._tokens = []
        self._admission.departed(self._choices)

    async def queue(self, prompt_tokens: list[int]) -> None:
        """The prompts, by request, wait for their first tokens. Raises QueueFull."""
        await self._admission.queue(sum(prompt_tokens))
        self._tokens = list(prompt_tokens)

    def started(self, request: int) -> None:
        """The first token of this request is there: its prompt waits no longer."""
        self._admission.started(self._tokens[request])
        self._tokens[request] = 0
