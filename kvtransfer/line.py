"""What one session still has to say: a bounded queue between those who must not wait and a connection that may."""

from __future__ import annotations

import asyncio

from kvtransfer.messages import Message

LIMIT = 4096  # messages: far more than the hand-offs of a pair keep under way


class Line:
    """A peer that cannot keep up ends its session: a resumed one asks for what it needs."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self.ended = asyncio.Event()

    def send(self, message: Message) -> None:
        if self._queue.qsize() >= self._limit:
            self.end()
        elif not self.ended.is_set():
            self._queue.put_nowait(message)

    def end(self) -> None:
        """Nothing more is said, what waits included."""
        if not self.ended.is_set():
            self.ended.set()
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(None)

    async def next(self) -> Message | None:
        """The next message to say, when there is one. None: the session is to be ended."""
        message = await self._queue.get()
        if message is None:
            self._queue.put_nowait(None)  # so for the next who asks
        return message
