"""The registry of a process, from its flags: one store, guarded against being slow, and the records kept in it."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from random import Random

from baton.registry_url import registry_url
from core.clock import monotonic_s
from core.errors import ConfigError
from core.registry.breaker import GuardedStore
from core.registry.records import MAX_LABELS
from core.registry.registry import Registry

MAX_LABEL_CHARS = 128


@dataclass(frozen=True, slots=True)
class RegistryLink:
    """`registry.run` keeps the records; `close` comes after it has ended."""

    store: GuardedStore
    registry: Registry

    async def close(self) -> None:
        await self.store.close()


def open_registry(url: str, prefix: str) -> RegistryLink | None:
    """None without an address. Nothing is connected yet. Raises ConfigError."""
    if not url:
        return None
    try:
        from core.registry.redis_store import open_store
    except ImportError as error:
        raise ConfigError(f"--registry needs the extra `redis`: pip install 'baton[redis]' ({error})") from error
    store = GuardedStore(open_store(registry_url(url, os.environ), prefix), monotonic_s)
    return RegistryLink(store, Registry(store, monotonic_s, Random(secrets.randbits(64))))


def labels_of(text: str) -> dict[str, str]:
    """Of "name=value,...". Raises ConfigError."""
    if not text:
        return {}
    labels: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not name or not equals or len(part) > MAX_LABEL_CHARS:
            raise ConfigError(f"--labels must be name=value,... of at most {MAX_LABEL_CHARS} characters, got {part!r}")
        labels[name] = value
    if len(labels) > MAX_LABELS:
        raise ConfigError(f"--labels: at most {MAX_LABELS}, got {len(labels)}")
    return labels
