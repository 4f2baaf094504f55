"""Requests that have cost workers, as the saga asks for them: by the hash of what they ask, whoever sends it."""

from __future__ import annotations

from typing import Protocol

from core.messages import WorkerId
from core.security.tickets import prefix_hash
from router.generation import GenerationRequest


class Poison(Protocol):
    """core.registry.poison.PoisonCounts. Nothing here waits."""

    def count(self, content: bytes) -> int: ...

    def cost_a_worker(self, content: bytes, worker: WorkerId) -> None: ...

    def answered(self, content: bytes) -> None: ...


class NoPoison:
    """Each request is judged alone."""

    def count(self, content: bytes) -> int:
        return 0

    def cost_a_worker(self, content: bytes, worker: WorkerId) -> None: ...

    def answered(self, content: bytes) -> None: ...


def content_of(request: GenerationRequest) -> bytes:
    """Its prompt under its tenant's salt: a seed, or the number of choices, makes no other request of it."""
    return prefix_hash(request.prompt_ids, request.salt)
