"""What the tests of the router's front share: a front over a scripted Generator, in process and behind real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from scripted_generator import ScriptedGenerator

from core.sampling import SamplingParams
from router.app import Front, build_app
from router.limits import Limits, ServedModel
from router.metrics import RouterMetrics
from router.server import http_server
from router.tokenizer import ModelTokenizer, load_tokenizer

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "models" / "baton-tiny"
MODEL = "baton-tiny"
END_ID = 2
CONTEXT = 4096
VOCAB = 3072
HELLO = "Hello wörld, 日本 😀!"


def tiny_tokenizer() -> ModelTokenizer:
    return load_tokenizer(MODEL_FOLDER)


def say(tokenizer: ModelTokenizer, text: str, **script: Any) -> ScriptedGenerator:
    """A generator whose choices say this text, and end."""
    ids = [*tokenizer.encode_now(text, add_special_tokens=False), END_ID]
    return ScriptedGenerator(ids, top=lambda token_id: ((token_id, -0.5), (5, -1.5), (6, -2.5)), **script)


def front(
    tokenizer: ModelTokenizer,
    generator: ScriptedGenerator,
    limits: Limits | None = None,
    defaults: SamplingParams | None = None,
    **others: Any,
) -> Front:
    seeds = iter(range(1000, 10**9))
    model = ServedModel((MODEL, "alias"), CONTEXT, VOCAB, created=7, defaults=defaults or SamplingParams())
    return Front(
        model,
        tokenizer,
        generator,
        RouterMetrics(MODEL),
        limits or Limits(),
        new_seed=lambda: next(seeds),
        wall_clock=lambda: 12345.6,
        **others,
    )


@asynccontextmanager
async def in_process(served: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application directly."""
    transport = httpx.ASGITransport(build_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        yield client


@asynccontextmanager
async def on_socket(served: Front) -> AsyncIterator[int]:
    """The application behind its real server, on a free port."""
    server = http_server(build_app(served), drain_s=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.001)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@dataclass(frozen=True)
class Events:
    """A parsed event stream."""

    chunks: list[dict[str, Any]]
    done: bool

    @property
    def text(self) -> str:
        return "".join(self.texts(0))

    def texts(self, index: int) -> list[str]:
        return [
            choice["text"] if "text" in choice else choice["delta"].get("content", "")
            for chunk in self.chunks
            for choice in chunk.get("choices", ())
            if choice["index"] == index
        ]

    def finish(self, index: int = 0) -> str | None:
        reasons = [
            choice["finish_reason"]
            for chunk in self.chunks
            for choice in chunk.get("choices", ())
            if choice["index"] == index and choice["finish_reason"]
        ]
        assert len(reasons) <= 1, reasons
        return reasons[0] if reasons else None


def events(body: str) -> Events:
    """Reads `data: ...` frames strictly."""
    frames = body.split("\n\n")
    assert frames[-1] == "", "the last frame is not ended"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames[:-1]), frames
    payloads = [frame.removeprefix("data: ") for frame in frames[:-1]]
    done = "[DONE]" in payloads
    assert not done or (payloads.count("[DONE]") == 1 and payloads[-1] == "[DONE]")
    return Events([json.loads(payload) for payload in payloads if payload != "[DONE]"], done)


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, checked for its shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    assert len(response.content) <= 2048
    error: dict[str, Any] = body["error"]
    return error
