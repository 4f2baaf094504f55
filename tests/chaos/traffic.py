"""Streaming clients while a fault holds: what they asked, what each got, and when the next one got an answer again."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.chaos.table import Row
from tests.processes.answers import Answer, ask, assert_right, assert_right_or_refused, body, some_tokens
from tests.processes.cluster import PATIENCE_S, Cluster

STREAMED = [
    body(some_tokens(101, 40), 250),
    body(some_tokens(102, 200), 200),
    body(some_tokens(103, 150), 150, temperature=1.0, top_p=0.95, seed=3, n=2),
]
LONG = [body(some_tokens(110 + number, 600), 8) for number in range(3)]
PROBE = body(some_tokens(120, 200), 4)
ENDS_S = 60.0  # each request has ended so long after the fault is over, on a machine that others use too
RECOVERS_S = 30.0
EVERY_S = 0.4

References = dict[str, Answer]


async def references(cluster: Cluster) -> References:
    """What each request comes to when nothing happens to it."""
    requests = [*STREAMED, *LONG, PROBE]
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        answers = await asyncio.gather(*(ask(client, request, Answer()) for request in requests))
    for answer in answers:
        assert answer.error is None, answer.error
    return {str(request): answer for request, answer in zip(requests, answers, strict=True)}


class Traffic:
    """Requests of one test, each under a salt of its own: nothing of them is cached."""

    def __init__(self, cluster: Cluster, client: httpx.AsyncClient, right: References, salt: str) -> None:
        self._cluster = cluster
        self._client = client
        self._right = right
        self._salt = salt
        self._asked: list[tuple[Answer, Answer, asyncio.Task[Answer]]] = []
        self._probes = 0

    def send(self) -> None:
        """Some at once, in every state."""
        for request in STREAMED + LONG:
            self._send(request)

    async def go_on(self, for_s: float) -> None:
        """One request after another, whatever becomes of them."""
        ends_s, requests = time.monotonic() + for_s, itertools.cycle([*LONG, STREAMED[1]])
        while time.monotonic() < ends_s:
            self._send(next(requests))
            await asyncio.sleep(EVERY_S)

    def _send(self, request: dict[str, Any]) -> None:
        answer = Answer()
        salted = {**request, "cache_salt": f"{self._salt} {len(self._asked)}"}
        task = asyncio.create_task(ask(self._client, salted, answer))
        self._asked.append((answer, self._right[str(request)], task))

    @property
    def streaming(self) -> bool:
        """Some have begun to be answered, and none of the long ones has ended."""
        return sum(answer.count > 5 for answer, _, _ in self._asked) >= len(STREAMED)

    async def is_streaming(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not self.streaming:
                await asyncio.sleep(0.005)

    async def end(self, row: Row) -> None:
        """Every request ends in time: right, or with one clear error after nothing but right tokens."""
        async with asyncio.timeout(ENDS_S):
            await asyncio.gather(*(task for _, _, task in self._asked))
        for answer, reference, _ in self._asked:
            assert_right_or_refused(answer, reference)
            row.runs += 1
            row.lost += answer.error is not None
            row.survived += answer.error is None

    async def recovers(self, row: Row) -> None:
        """Ask again and again, until there is an answer, which must be right."""
        began_s = time.monotonic()
        while True:
            self._probes += 1
            request = {**PROBE, "cache_salt": f"{self._salt} probe {self._probes}"}
            answer = await ask(self._client, request, Answer())
            if answer.error is None:
                break
            assert time.monotonic() - began_s < RECOVERS_S, answer.error
            await asyncio.sleep(0.1)
        assert_right(answer, self._right[str(PROBE)])
        row.recovered_s.append(time.monotonic() - began_s)

    async def leave(self) -> None:
        for _, _, task in self._asked:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in self._asked), return_exceptions=True)


@asynccontextmanager
async def traffic(cluster: Cluster, right: References, salt: str) -> AsyncIterator[Traffic]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as client:
        made = Traffic(cluster, client, right, salt)
        try:
            yield made
        finally:
            await made.leave()
