"""Requests that never stop coming while a cluster is changed or hurt, and the count of what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.processes.answers import Answer, ask, body, some_tokens

SHORT = [body(some_tokens(40 + number, 60 + 30 * number), 24) for number in range(6)]
STEADY = [body(some_tokens(60 + number, 150 + 40 * number), 60) for number in range(6)]
PROMPTS = [body(some_tokens(80 + number, 1500), 2) for number in range(4)]  # nearly all of it is prefill
ANSWERS = [body(some_tokens(100 + number, 40), 350, n=6) for number in range(5)]  # nearly all of it is decode
ALL = SHORT + STEADY + PROMPTS + ANSWERS

References = Mapping[str, Answer]


@dataclass
class Tally:
    """Right, wrong and lost answers; the longest time without a right one."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    last_s: float = field(default_factory=time.monotonic)
    gap_s: float = 0.0

    def take(self, answer: Answer, reference: Answer) -> None:
        if answer.error is not None or not answer.is_done:
            self.lost.append(f"{answer.status} after {answer.count} tokens: {answer.error}")
        elif (answer.tokens, answer.texts) != (reference.tokens, reference.texts):
            self.wrong.append(f"{answer.texts} is not {reference.texts}")
        else:
            self.right += 1
            now_s = time.monotonic()
            self.gap_s, self.last_s = max(self.gap_s, now_s - self.last_s), now_s

    def assert_whole(self, least: int = 1) -> None:
        assert not self.lost and not self.wrong, (self.right, self.lost[:5], self.wrong[:5])
        assert self.right >= least


@asynccontextmanager
async def asking(url: str, bodies: list[dict[str, Any]], references: References, at_once: int) -> AsyncIterator[Tally]:
    """Within the block so many requests are under way at any time; in the end each of them is awaited."""
    tally, over = Tally(), asyncio.Event()
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:

        async def keep_asking(first: int) -> None:
            number = first
            while not over.is_set():
                request = bodies[number % len(bodies)]
                answer = Answer()
                try:
                    await ask(client, {**request, "cache_salt": f"{time.monotonic()} {number}"}, answer)
                except httpx.HTTPError as error:
                    answer.error = {"message": repr(error)}
                tally.take(answer, references[str(request)])
                number += at_once

        tasks = [asyncio.create_task(keep_asking(first)) for first in range(at_once)]
        try:
            yield tally
        finally:
            over.set()
            await asyncio.gather(*tasks)


async def answers_of(url: str) -> dict[str, Answer]:
    """What a server says to every request."""
    async with httpx.AsyncClient(base_url=url) as client:
        found = await asyncio.gather(*(ask(client, request, Answer()) for request in ALL))
    return {str(request): answer for request, answer in zip(ALL, found, strict=True)}
