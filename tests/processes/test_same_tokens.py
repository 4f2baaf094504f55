"""Handed off, in one worker, or prefilled on decode: in float32 the same tokens, and the right answers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import pytest

from tests.processes.answers import NAME, Answer, ask, assert_right, body, some_tokens
from tests.processes.cluster import ROOT, Cluster, serving

AT_ONCE = 8
RECALLS = 200
COMPARED = 30
RECALL_SHARE = 0.95


@pytest.fixture(scope="module")
def local() -> Iterator[Cluster]:
    """The decode worker prefills every prompt."""
    with serving("--local-prefill", "100000") as cluster:
        yield cluster


def requests() -> list[dict[str, Any]]:
    """Prompts around the borders of pages (16 tokens), chunks (512) and the local threshold; greedy and seeded."""
    lengths = [1, 15, 16, 17, 127, 128, 129, 143, 144, 511, 512, 513, 700, 1030, 1900]
    greedy = [body(some_tokens(length, length), 40) for length in lengths]
    drawn = [
        body(some_tokens(length, length), 25, temperature=1.0, top_p=0.9, seed=length, n=2, frequency_penalty=0.5)
        for length in (16, 130, 600)
    ]
    return greedy + drawn


async def answers_of(cluster: Cluster, bodies: list[dict[str, Any]]) -> list[Answer]:
    """Asked some at once, so that rows of different requests share steps."""
    turn = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=cluster.url) as client:

        async def one(request: dict[str, Any]) -> Answer:
            async with turn:
                return await ask(client, request, Answer())

        return list(await asyncio.gather(*map(one, bodies)))


async def test_every_way_through_gives_the_same_tokens(
    disaggregated: Cluster, aggregated: Cluster, local: Cluster
) -> None:
    committed = disaggregated.total("baton:handoffs_total", "outcome", "committed")
    handed_off = await answers_of(disaggregated, requests())
    moved = disaggregated.total("baton:handoffs_total", "outcome", "committed") - committed
    assert moved == 2 * sum(len(request["prompt"]) >= 128 for request in requests()), "at both ends of each"
    together = await answers_of(aggregated, requests())
    prefilled_on_decode = await answers_of(local, requests())
    assert local.total("baton:local_prefills_total") == len(requests())
    for one, other, third in zip(handed_off, together, prefilled_on_decode, strict=True):
        assert_right(other, one)
        assert_right(third, one)


async def test_what_is_cached_gives_the_same_tokens_as_what_is_not(disaggregated: Cluster) -> None:
    fresh = await answers_of(disaggregated, [{**request, "cache_salt": "fresh"} for request in requests()])
    hits = disaggregated.total("vllm:prefix_cache_hits_total")
    cached = await answers_of(disaggregated, [{**request, "cache_salt": "fresh"} for request in requests()])
    assert disaggregated.total("vllm:prefix_cache_hits_total") > hits
    for one, other in zip(cached, fresh, strict=True):
        assert_right(one, other)


def recall_questions(count: int) -> list[tuple[dict[str, Any], str]]:
    """Chats that ask for one of 64 pairs, each with its answer."""
    sys.path.insert(0, str(ROOT / "models" / "train"))
    try:
        import exercises
    finally:
        sys.path.pop(0)
    rng = Random(1000)
    made = [exercises.recall_exercise(rng) for _ in range(count)]
    return [
        ({"model": NAME, "messages": item.messages, "temperature": 0, "max_tokens": 12}, item.answer) for item in made
    ]


async def contents(cluster: Cluster, bodies: list[dict[str, Any]]) -> list[str]:
    turn = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120) as client:

        async def one(request: dict[str, Any]) -> str:
            async with turn:
                reply = await client.post("/v1/chat/completions", json=request)
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["message"]["content"])

        return list(await asyncio.gather(*map(one, bodies)))


@pytest.mark.timeout(600)
async def test_recall_over_long_prompts_that_were_handed_off(disaggregated: Cluster, aggregated: Cluster) -> None:
    questions = recall_questions(RECALLS)
    before = disaggregated.metric("baton:handoffs_total", "outcome")["decode-0"]
    given = await contents(disaggregated, [request for request, _ in questions])
    after = disaggregated.metric("baton:handoffs_total", "outcome")["decode-0"]
    assert sum(after.values()) == sum(before.values()) + RECALLS
    # An answer that ends with its first token is complete before the hand-off is, which is cancelled then.
    assert after["committed"] >= before["committed"] + RECALLS / 2
    right = sum(content == answer for content, (_, answer) in zip(given, questions, strict=True))
    print(f"recall: {right} of {RECALLS}")
    assert right >= RECALL_SHARE * RECALLS
    assert given[:COMPARED] == await contents(aggregated, [request for request, _ in questions[:COMPARED]])
