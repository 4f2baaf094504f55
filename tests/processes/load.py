"""Requests in every state at once: decoded in mid-stream, being prefilled, and queued for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.processes.answers import NAME, Answer, ask, body, some_tokens
from tests.processes.cluster import PATIENCE_S, Cluster

STREAMED = [
    body(some_tokens(1, 40), 400),
    body(some_tokens(2, 200), 350),
    body(some_tokens(3, 150), 300, temperature=1.0, top_p=0.95, seed=3, n=2),
]
LONG = [body(some_tokens(10 + number, 1100), 10) for number in range(5)]  # the last of them wait for the others
ENDLESS = body(some_tokens(9, 40), 1900, n=8, temperature=1.0, seed=9)  # it never ends before somebody gives it up
REFILLS = 4  # calls of 16 prompts: retries are at most a fifth of what has been asked


@dataclass
class Asked:
    """A request under way, and what it must come to."""

    answer: Answer
    reference: Answer
    task: asyncio.Task[Answer]


class Load:
    """Sends requests to a cluster, each under its test's own salt: nothing of it is cached."""

    def __init__(self, client: httpx.AsyncClient, salt: str, references: dict[str, Answer]) -> None:
        self._client = client
        self._salt = salt
        self._references = references
        self.asked: list[Asked] = []

    def send(self, bodies: list[dict[str, Any]]) -> list[Asked]:
        sent = []
        for request in bodies:
            answer = Answer()
            salted = {**request, "cache_salt": f"{self._salt} {len(self.asked) + len(sent)}"}
            task = asyncio.create_task(ask(self._client, salted, answer))
            sent.append(Asked(answer, self._references[str(request)], task))
        self.asked += sent
        return sent

    async def answers(self) -> list[tuple[Answer, Answer]]:
        """Each with its reference, once all have ended."""
        await asyncio.gather(*(asked.task for asked in self.asked))
        return [(asked.answer, asked.reference) for asked in self.asked]

    async def leave(self) -> None:
        """Every client goes away."""
        for asked in self.asked:
            asked.task.cancel()
        await asyncio.gather(*(asked.task for asked in self.asked), return_exceptions=True)


async def references(cluster: Cluster) -> dict[str, Answer]:
    """What each request comes to when nothing happens to it."""
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        requests = STREAMED + LONG
        answers = await asyncio.gather(*(ask(client, request, Answer()) for request in requests))
    return {str(request): answer for request, answer in zip(requests, answers, strict=True)}


async def refill_retries(client: httpx.AsyncClient) -> None:
    """Enough requests without a fault that the router may retry again."""
    few = {"model": NAME, "prompt": [[300 + n] for n in range(16)], "max_tokens": 1}
    for _ in range(REFILLS):
        (await client.post("/v1/completions", json=few)).raise_for_status()


async def tokens_of(asked: list[Asked], count: int) -> None:
    """Wait until each has brought so many tokens."""
    ends_s = time.monotonic() + PATIENCE_S
    while any(a.answer.count < count and not a.task.done() for a in asked):
        assert time.monotonic() < ends_s, [a.answer.count for a in asked]
        await asyncio.sleep(0.001)
    assert all(a.answer.count >= count for a in asked)
