"""The port to a shared store of short-lived values: what registry, limits and poison counts are kept in.

Everything in it has a lifetime and is written again by its owner, so a store that is lost, emptied or replaced by an
old copy is whole again within one lifetime. One contract test runs over all stores.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

MAX_NAMES = 4096  # of one group: a reader never asks for more
MAX_VALUE_BYTES = 16 << 10


class Store(Protocol):
    """Every method may raise RegistryAway, and soon: nobody waits for the store."""

    async def put(self, group: str, name: str, value: bytes, life_s: float) -> None:
        """Write, or write again. The value vanishes after `life_s`."""
        ...

    async def remove(self, group: str, name: str) -> None: ...

    async def read(self, group: str) -> dict[str, bytes]:
        """Every living value of a group by name, at most MAX_NAMES."""
        ...

    async def add(self, counter: str, amount: int, life_s: float) -> int:
        """Add to a counter and return the sum. It begins at nought, and ends `life_s` after its first addition."""
        ...

    async def tell(self, group: str) -> None:
        """Wake whoever listens for changes of the group."""
        ...

    def listen(self, group: str) -> AsyncIterator[None]:
        """One item when listening has begun, then one for each `tell`. A message may be lost: readers also poll."""
        ...

    async def close(self) -> None: ...
