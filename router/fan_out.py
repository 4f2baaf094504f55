"""One call, several requests: their steps as one stream, each with the number of its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from router.generation import GenerationRequest, Generator, Step

Steps = AsyncIterator[tuple[int, Step]]


@asynccontextmanager
async def generated(generator: Generator, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Steps, None]:
    """Submits all requests. Leaving the block closes their iterators, which cancels what still runs."""
    streams = [generator.generate(request) for request in requests]
    merged = _one(streams[0]) if len(streams) == 1 else _merged(streams)
    try:
        yield merged
    finally:
        await merged.aclose()
        for stream in streams:
            await _close(stream)


async def _one(stream: AsyncIterator[Step]) -> AsyncGenerator[tuple[int, Step], None]:
    async for step in stream:
        yield 0, step


async def _merged(streams: Sequence[AsyncIterator[Step]]) -> AsyncGenerator[tuple[int, Step], None]:
    """Whoever has a step comes next. An error of one request ends the call."""
    waiting = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                step = task.result()
                if step is not None:
                    waiting[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, step
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(stream: AsyncIterator[Step]) -> Step | None:
    return await anext(stream, None)


async def _close(stream: AsyncIterator[Step]) -> None:
    """Async generators have aclose(); a plain iterator has nothing to close."""
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
