"""The background tasks of one end: each is held, logged when it fails, and gone when the end stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Chores:
    """Belongs to the event loop that it is used on. The event loop alone keeps no task alive."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        if self._stopped:
            task.cancel()  # the end of another part has begun it
        return task

    def every(self, pause_s: float, do: Callable[[], None], name: str) -> None:
        """Call `do` again and again."""

        async def again() -> None:
            while True:
                await asyncio.sleep(pause_s)
                try:
                    do()
                except Exception:
                    log.exception("%s failed", name)

        self.spawn(again(), name)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())

    async def stop(self) -> None:
        """Cancel everything, what others begin because of that too, and wait until it is over."""
        self._stopped = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
