"""The seam between the HTTP front and the saga: one admitted request in, its tokens out, each index once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from core.messages import Receipt, Token
from core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request, tokenized. `request_id` is the server's own, 128 bits, random."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    deadline_s: float
    salt: bytes = b""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Some tokens of the request's choices, in order per choice; the receipt comes with the first tokens."""

    tokens: tuple[Token, ...]
    receipt: Receipt | None = None


class Generator(Protocol):
    """Runs requests on the workers. The real one is the saga over worker sessions; tests use a scripted one."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Step]:
        """Yields steps until every choice has a finish reason. Closing the iterator cancels at every holder.

        Raises Overloaded (before the first token), DeadlineExceeded, WorkerError, PoisonRequest.
        """
        ...

    def finish_choice(self, request_id: str, choice: int) -> None:
        """The front has ended this choice (a stop string): it is not decoded any further."""
        ...
