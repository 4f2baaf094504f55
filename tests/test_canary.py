"""What a health check learns of an engine: that its model computes, though nobody has asked it anything lately."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.errors import EngineError
from core.sampling import SamplingParams
from engine.batch import Batch, RowResult
from engine.canary import FRESH_S
from engine.hashchain import reference_tokens
from tests.test_engine import VOCABULARY, Harness


@asynccontextmanager
async def running(harness: Harness) -> AsyncIterator[list[Batch]]:
    """The engine's loop, and every batch that it computes."""
    batches: list[Batch] = []
    execute = harness.executor.execute

    def watched(batch: Batch) -> list[RowResult]:
        batches.append(batch)
        return execute(batch)

    harness.executor.execute = watched  # type: ignore[method-assign]
    loop = asyncio.create_task(harness.engine.run())
    try:
        async with asyncio.timeout(20):
            yield batches
    finally:
        loop.cancel()


async def test_an_idle_engine_computes_one_token_on_the_frame_of_nobody() -> None:
    harness = Harness()
    async with running(harness) as batches:
        await harness.engine.turn()
        assert [(row.ids, list(row.pages)) for batch in batches for row in batch.rows] == [((0,), [0])]
        await harness.engine.turn()
        assert len(batches) == 1, "the step before is proof enough"
        harness.now_s += FRESH_S + 1
        await asyncio.gather(*(harness.engine.turn() for _ in range(5)))
        assert len(batches) == 2, "checks that come together share a token"
    assert harness.engine.is_idle and not harness.tokens and not harness.failed
    harness.check()


async def test_a_busy_engine_needs_no_other_proof() -> None:
    harness, params = Harness(), SamplingParams(max_tokens=30, temperature=0.0)
    harness.add("a", [5, 6, 7], params)
    async with running(harness) as batches:
        await harness.engine.turn()
        assert all(row.sequence_id for batch in batches for row in batch.rows)
        while not harness.engine.is_idle:
            await asyncio.sleep(0)
    assert harness.tokens["a", 0] == reference_tokens([5, 6, 7], params, 1, 0, VOCABULARY)


async def test_a_model_that_does_not_compute_is_said_and_may_recover() -> None:
    harness = Harness()
    sound = harness.executor.execute

    def broken(batch: Batch) -> list[RowResult]:
        raise EngineError("the device is gone")

    harness.executor.execute = broken  # type: ignore[method-assign]
    loop = asyncio.create_task(harness.engine.run())
    async with asyncio.timeout(20):
        with pytest.raises(EngineError, match="the device is gone"):
            await harness.engine.turn()
        harness.executor.execute = sound  # type: ignore[method-assign]
        await harness.engine.turn()
    loop.cancel()


async def test_who_leaves_during_a_canary_gives_its_pages_back() -> None:
    harness = Harness()
    sequence = harness.add("a", [1] * 40, SamplingParams(max_tokens=4, temperature=0.0))
    assert harness.engine.reserve(sequence)
    harness.engine.remove(sequence)  # gone before the loop runs: the loop is idle
    other = harness.add("b", [1] * 40, SamplingParams(max_tokens=4, temperature=0.0))
    assert harness.engine.reserve(other)
    harness.engine._sequences.clear()  # it holds pages, and no step will have it
    harness.before_step = lambda: harness.engine.remove(other)
    async with running(harness) as batches:
        await harness.engine.turn()
        assert len(batches) == 1
    harness.check()
