"""An event loop on a thread of its own, for callers that have none: it lives on between their calls.

Running a loop for each call would stop the engine in between; and inside a notebook, which has a loop already, a second
one on the same thread is not allowed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

CLEAN_UP_S = 30.0

T = TypeVar("T")


class LoopThread:
    """A daemon: a program that forgets to close it can still end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it to its end on the loop. Ctrl-C cancels it there, waits for its clean-up, and goes on up.

        Raises RuntimeError after close.
        """
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("it has been closed")
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_then(work, ended), self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, CancelledError):
            future.cancel()
            ended.wait(CLEAN_UP_S)
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _then(work: Coroutine[Any, Any, T], ended: threading.Event) -> T:
    try:
        return await work
    finally:
        ended.set()
