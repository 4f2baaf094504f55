"""A store within one process: for a single router, for tests and for simulation. Time is that of the clock given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from core.clock import Clock
from core.errors import RegistryAway
from core.registry.store import MAX_NAMES

MAX_LISTENERS = 1024
Key = tuple[str, str]  # group, name


class MemoryShelf:
    """What several stores of one process share. `away` and `clear` are for tests."""

    def __init__(self, clock: Clock) -> None:
        self.away = False
        self._clock = clock
        self._values: dict[Key, tuple[float, bytes]] = {}  # -> (until, value)
        self._counters: dict[str, tuple[float, int]] = {}
        self._listeners: set[tuple[str, asyncio.Queue[None]]] = set()

    def clear(self) -> None:
        """As if it had been restarted without its data."""
        self._values.clear()
        self._counters.clear()

    def copy(self) -> dict[Key, tuple[float, bytes]]:
        """For a later `restore`."""
        return dict(self._values)

    def restore(self, copy: dict[Key, tuple[float, bytes]]) -> None:
        """As if it had come back with an old copy of its data."""
        self._values = dict(copy)

    def _check(self) -> float:
        if self.away:
            raise RegistryAway("the store is away")
        return self._clock()

    def put(self, key: Key, value: bytes, life_s: float) -> None:
        self._values[key] = (self._check() + life_s, value)

    def remove(self, key: Key) -> None:
        self._check()
        self._values.pop(key, None)

    def read(self, group: str) -> dict[str, bytes]:
        now_s = self._check()
        self._values = {key: found for key, found in self._values.items() if found[0] > now_s}
        names = sorted(name for at, name in self._values if at == group)[:MAX_NAMES]
        return {name: self._values[group, name][1] for name in names}

    def add(self, counter: str, amount: int, life_s: float) -> int:
        now_s = self._check()
        self._counters = {name: found for name, found in self._counters.items() if found[0] > now_s}
        until_s, value = self._counters.get(counter, (now_s + life_s, 0))
        self._counters[counter] = (until_s, value + amount)
        return value + amount

    def tell(self, group: str) -> None:
        self._check()
        for listened, queue in self._listeners:
            if listened == group and not queue.full():
                queue.put_nowait(None)

    def enter(self, group: str) -> tuple[str, asyncio.Queue[None]]:
        self._check()
        if len(self._listeners) >= MAX_LISTENERS:
            raise RegistryAway("too many listeners")
        place = (group, asyncio.Queue[None](maxsize=1))
        self._listeners.add(place)
        return place

    def leave(self, place: tuple[str, asyncio.Queue[None]]) -> None:
        self._listeners.discard(place)


class MemoryStore:
    """One member's view of a shelf."""

    def __init__(self, shelf: MemoryShelf) -> None:
        self._shelf = shelf

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        self._shelf.put((group, name), value, life_s)

    async def remove(self, group: str, name: str) -> None:
        self._shelf.remove((group, name))

    async def read(self, group: str) -> dict[str, bytes]:
        return self._shelf.read(group)

    async def add(self, counter: str, amount: int, life_s: float) -> int:
        return self._shelf.add(counter, amount, life_s)

    async def tell(self, group: str) -> None:
        self._shelf.tell(group)

    async def listen(self, group: str) -> AsyncIterator[None]:
        place = self._shelf.enter(group)
        try:
            yield
            while True:
                await place[1].get()
                yield
        finally:
            self._shelf.leave(place)

    async def close(self) -> None:
        """Nothing is held."""
