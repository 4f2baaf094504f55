"""A thread that writes a tier's decisions into the registry, so that whoever decides never waits for a store."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from core.errors import ConfigError, RegistryAway
from core.registry.decisions import LIFE_S, Decision, publish
from core.registry.store import Store

log = logging.getLogger("ray.serve")

AGAIN_S = LIFE_S / 3


class DecisionPublisher:
    """Keeps the newest decision written until it is closed. `say` returns at once, whatever the store does."""

    def __init__(self, open_it: Callable[[], Store]) -> None:
        """`open_it` is called on the thread; it may raise ConfigError."""
        self._open = open_it
        self._newest: Decision | None = None
        self._news = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="baton-decisions", daemon=True)
        self._thread.start()

    def say(self, decision: Decision) -> None:
        is_new = decision != self._newest
        self._newest = decision
        if is_new:
            self._news.set()

    def close(self) -> None:
        """The thread ends soon; nobody waits for it."""
        self._closed = True
        self._news.set()

    def _run(self) -> None:
        try:
            store = self._open()
        except ConfigError as error:
            log.error("scaling decisions are not published: %s", error.message)
            return
        with asyncio.Runner() as runner:
            while not self._closed:
                self._news.wait(AGAIN_S)
                self._news.clear()
                if self._newest is not None and not self._closed:
                    runner.run(_try_to(store, self._newest))
            runner.run(store.close())


async def _try_to(store: Store, decision: Decision) -> None:
    try:
        await publish(store, decision)
    except RegistryAway as error:
        log.info("the decision about %s is not published: %s", decision.tier, error.message)
