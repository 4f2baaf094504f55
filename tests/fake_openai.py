"""A small OpenAI server with a timetable, for the tests of the client tools: it runs in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeOpenAI:
    """What the server does, settable by a test, and what it has seen."""

    first_s: float = 0.0  # before the first chunk
    gap_s: float = 0.0  # between chunks
    words: tuple[str, ...] = ("one ", "two ", "three")
    refuse_every: int = 0  # each k-th request gets a 503
    break_after: int | None = None  # chunks after which the connection ends
    error_after: int | None = None  # chunks after which an error event comes
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        if self.refuse_every and len(self.seen) % self.refuse_every == 0:
            return web.json_response({"error": {"message": "too busy", "code": "no_capacity"}}, status=503)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            return await self._stream(request, body)
        finally:
            self.busy -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            await self._event(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.first_s)
        for index, word in enumerate(self.words):
            if index:
                await asyncio.sleep(self.gap_s)
            if index == self.break_after:
                request.transport.abort()
                return response
            if index == self.error_after:
                await self._event(response, {"error": {"message": "a worker was lost", "code": "worker_lost"}})
                break
            content = {"delta": {"content": word}} if chat else {"text": word}
            reason = "length" if index == len(self.words) - 1 else None
            await self._event(response, {"choices": [{"index": 0, "finish_reason": reason, **content}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.words)}
        if body.get("stream_options", {}).get("include_usage"):
            await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, data: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


@contextmanager
def running(server: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Serves until the block is left, on a port of the system's choice."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake-openai")
    thread.start()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def stop() -> None:
        await runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
