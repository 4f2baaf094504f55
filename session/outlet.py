"""What goes up to which router: one message per router and step, kept until it may be forgotten, resumed after a break.

An engine never waits for a router. Each router has a bounded queue; when it is full the session ends, and the router,
reconnecting, names the next index it lacks: tokens are kept until their request has been over for some time.

    submit --> held --tokens, failure--> ended --linger_s--> forgotten
                 |
                 `--session lost--> grace_s without a reconnect --> to be cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from core.clock import Clock
from core.messages import RequestFailed, Token, TokenBatch, Tokens

Key = tuple[str, int]  # request id, attempt
RESUMED_ITEMS = 256  # of one message: with 20 likely ids each they stay well below a message's limit


@dataclass(slots=True)
class _Held:
    """What was sent for one attempt."""

    router: str
    tokens: list[Tokens] = field(default_factory=list)
    failed: RequestFailed | None = None
    ended_s: float | None = None


@dataclass(slots=True)
class RouterQueue:
    """The messages on their way to one router; `None` closes the session."""

    messages: asyncio.Queue[TokenBatch | RequestFailed | None]
    lost_s: float | None = None

    def put(self, message: TokenBatch | RequestFailed) -> None:
        """Queue it, or end the session: the router will ask again for what it lacks."""
        if self.lost_s is not None:
            return
        try:
            self.messages.put_nowait(message)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """Close the session. What waits is dropped: the router asks for it again when it is back."""
        while not self.messages.empty():
            self.messages.get_nowait()
        self.messages.put_nowait(None)


class Outlet:
    """Owned by the event loop's thread."""

    def __init__(
        self, clock: Clock, *, queue_messages: int = 1024, grace_s: float = 5.0, linger_s: float = 10.0
    ) -> None:
        self._clock = clock
        self._queue_messages = queue_messages
        self._grace_s = grace_s
        self._linger_s = linger_s
        self._held: dict[Key, _Held] = {}
        self._routers: dict[str, RouterQueue] = {}

    # --- sessions --------------------------------------------------------------------------------------------

    def open(self, router: str, resume: Mapping[Key, tuple[int, ...]]) -> tuple[RouterQueue, list[Key]]:
        """A router has connected. Returns its queue, and the attempts held for it that it no longer runs.

        An older session of the same router ends: its process has moved on.
        """
        older = self._routers.get(router)
        if older is not None and older.lost_s is None:
            older.end()
        missing = [message for key, next_index in resume.items() for message in self._missing(router, key, next_index)]
        # What it lacks comes on top of the bound: a resumption that overflowed would end, and begin, for ever.
        queue = self._routers[router] = RouterQueue(asyncio.Queue(self._queue_messages + len(missing)))
        held = [key for key, item in self._held.items() if item.router == router]
        for message in missing:
            queue.put(message)
        return queue, [key for key in held if key not in resume and self._held[key].ended_s is None]

    def close(self, router: str, queue: RouterQueue) -> None:
        """The session has ended. Its requests are kept for the time of a reconnect."""
        queue.lost_s = self._clock()
        while not queue.messages.empty():
            queue.messages.get_nowait()

    def sweep(self) -> list[Key]:
        """Forget what is over; returns the attempts whose router has not come back in time."""
        now_s = self._clock()
        over = [k for k, h in self._held.items() if h.ended_s is not None and now_s - h.ended_s > self._linger_s]
        for key in over:
            del self._held[key]
        gone = {
            name
            for name, queue in self._routers.items()
            if queue.lost_s is not None and now_s - queue.lost_s > self._grace_s
        }
        for name in gone:
            del self._routers[name]
        return [key for key, held in self._held.items() if held.router in gone and held.ended_s is None]

    def end_all(self) -> None:
        """Close every session: the worker stops."""
        for queue in self._routers.values():
            queue.end()

    # --- requests --------------------------------------------------------------------------------------------

    def hold(self, router: str, key: Key) -> bool:
        """Remember whose attempt this is. False if it is known already: a Submit may come twice."""
        if key in self._held:
            return False
        self._held[key] = _Held(router)
        return True

    def send(self, items: Iterable[Tokens | RequestFailed]) -> None:
        """One step's news: one message per router, and a failure by itself."""
        by_router: dict[str, list[Tokens]] = {}
        for item in items:
            held = self._held.get((item.request_id, item.attempt))
            if held is None or held.ended_s is not None:
                continue
            if isinstance(item, Tokens):
                held.tokens.append(item)
                by_router.setdefault(held.router, []).append(item)
            else:
                held.failed = item
                held.ended_s = self._clock()
                self._put(held.router, item)
        for router, tokens in by_router.items():
            self._put(router, TokenBatch(tuple(tokens)))

    def end(self, key: Key) -> None:
        """Nothing more will be sent for this attempt."""
        held = self._held.get(key)
        if held is not None and held.ended_s is None:
            held.ended_s = self._clock()

    def forget(self, key: Key) -> None:
        """The router asked for it to be cancelled."""
        self._held.pop(key, None)

    @property
    def live(self) -> int:
        """Attempts that are not over."""
        return sum(held.ended_s is None for held in self._held.values())

    @property
    def is_sent(self) -> bool:
        """Nothing waits on its way to a router whose session is open."""
        return all(queue.lost_s is not None or queue.messages.empty() for queue in self._routers.values())

    def _put(self, router: str, message: TokenBatch | RequestFailed) -> None:
        queue = self._routers.get(router)
        if queue is not None:
            queue.put(message)

    def _missing(self, router: str, key: Key, next_index: tuple[int, ...]) -> list[TokenBatch | RequestFailed]:
        """What a router lacks of one attempt, from these indices on, in messages of bounded size."""
        held = self._held.get(key)
        if held is None or held.router != router:  # nor does it tell one router of another's requests
            return [RequestFailed(*key, code="worker_lost", message="this worker does not know the request")]
        items = [part for item in held.tokens if (part := _after(item, next_index)) is not None]
        starts = range(0, len(items), RESUMED_ITEMS)
        messages: list[TokenBatch | RequestFailed]
        messages = [TokenBatch(tuple(items[at : at + RESUMED_ITEMS])) for at in starts]
        return messages if held.failed is None else [*messages, held.failed]


def _after(item: Tokens, next_index: tuple[int, ...]) -> Tokens | None:
    """The tokens of an item that are at or past the next index of their choice.

    A receipt stays, whatever the router has of its tokens: another worker may have brought them.
    """

    def lacks(token: Token) -> bool:
        return token.choice >= len(next_index) or token.index >= next_index[token.choice]

    tokens = tuple(token for token in item.tokens if lacks(token))
    return Tokens(item.request_id, item.attempt, tokens, item.receipt) if tokens or item.receipt else None
