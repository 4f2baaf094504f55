"""Without faults: every way through the cluster gives the same tokens, and nothing is left."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from core.messages import Receipt
from core.sampling import SamplingParams
from engine.hashchain import reference_tokens
from router.generation import Step
from tests.simulation.cluster import VOCABULARY, SimCluster, request_of
from tests.simulation.virtual_time import run


def tokens_of(steps: list[Step]) -> dict[int, list[int]]:
    """Per choice, having checked that each index came once and in order."""
    found: dict[int, list[int]] = {}
    for step in steps:
        for token in step.tokens:
            ids = found.setdefault(token.choice, [])
            assert token.index == len(ids), (token, ids)
            ids.append(token.token_id)
    return found


def prompt_of(rng: Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def wanted(prompt: list[int], params: SamplingParams) -> dict[int, list[int]]:
    assert params.seed is not None
    return {c: reference_tokens(prompt, params, params.seed, c, VOCABULARY) for c in range(params.n)}


@pytest.mark.parametrize("shape", [{"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "aggregated": 2}])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 64, 65, 400])
def test_lengths_and_choices(shape: dict[str, int], length: int) -> None:
    async def main() -> None:
        cluster = SimCluster(length, **shape)
        await cluster.start()
        for n, temperature in ((1, 0.0), (3, 1.0)):
            params = SamplingParams(max_tokens=21, n=n, temperature=temperature, seed=7)
            prompt = prompt_of(Random(length), length)
            steps = await cluster.generate(request_of(f"r{n}", prompt, params))
            assert tokens_of(steps) == wanted(prompt, params)
            receipts = [step.receipt for step in steps if step.receipt is not None]
            assert len(receipts) == 1
            assert receipts[0].prompt_tokens == length
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_long_prompts_go_to_prefill_and_second_turns_find_their_history() -> None:
    async def main() -> None:
        cluster = SimCluster(1, prefill=1, decode=1)
        await cluster.start()
        rng = Random(1)
        prompt = prompt_of(rng, 200)
        params = SamplingParams(max_tokens=30, temperature=0.0, seed=0)
        first = await cluster.generate(request_of("a", prompt, params))
        await asyncio.sleep(0.2)
        prompt += tokens_of(first)[0] + prompt_of(rng, 10)
        second = await cluster.generate(request_of("b", prompt, params))
        assert tokens_of(second) == wanted(prompt, params)
        receipts = [step.receipt for step in (*first, *second) if step.receipt is not None]
        shares = {"computed_tokens": 200, "transferred_tokens": 200}
        figures = ("exposed_transfer_s", "queue_s", "transferred_bytes", "hidden_bytes", "transfer_s")
        assert receipts[0] == Receipt(**shares, **{name: getattr(receipts[0], name) for name in figures})
        assert 0 < (receipts[0].overlap or 0) < 1, "chunks moved while others were computed"
        assert receipts[1].cached_decode_tokens >= 224, "the history lies on the decode worker"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_more_requests_than_pages() -> None:
    async def main() -> None:
        cluster = SimCluster(2, prefill=2, decode=1, pages=40)
        await cluster.start()
        rng = Random(2)
        jobs = []
        for i in range(24):
            prompt = prompt_of(rng, rng.randrange(1, 250))
            params = SamplingParams(max_tokens=rng.randrange(1, 120), temperature=0.0, seed=i)
            jobs.append((prompt, params, asyncio.create_task(cluster.generate(request_of(f"r{i}", prompt, params)))))
        for prompt, params, task in jobs:
            assert tokens_of(await task) == wanted(prompt, params)
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_leaving_cancels_everywhere() -> None:
    async def main() -> None:
        cluster = SimCluster(3, prefill=1, decode=1)
        await cluster.start()
        for after in (0, 1, 2, 20):
            params = SamplingParams(max_tokens=500, temperature=0.0, seed=0)
            stream = cluster.saga.generate(request_of(f"r{after}", prompt_of(Random(after), 300), params))
            task = asyncio.create_task(_read(stream, after))  # type: ignore[arg-type]
            await asyncio.sleep(0.03 * after)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await cluster.quiesce(5.0) == []
        await cluster.close()

    run(main())


async def _read(stream, steps: int) -> None:  # type: ignore[no-untyped-def]
    try:
        async for _ in stream:
            pass
    finally:
        await stream.aclose()
