"""One completion as its client sees it: every event read, and whether it ended whole or with one clear error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

NAME = "baton-tiny"
WAIT = httpx.Timeout(120.0)


@dataclass
class Answer:
    """What came, while it comes. `tokens` and `texts` are by choice."""

    status: int = 0
    tokens: dict[int, list[str]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    completion_tokens: int | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False  # [DONE] came

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens.values()))

    def take(self, data: str) -> None:
        """One server-sent event."""
        assert self.error is None and not self.is_done, f"after the end: {data}"
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        if event.get("usage"):
            self.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            self.tokens.setdefault(index, []).extend((choice["logprobs"] or {}).get("tokens", ()))
            if choice["finish_reason"]:
                self.finishes[index] = choice["finish_reason"]


def body(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A completion of exactly `max_tokens`, greedy unless the fields say otherwise."""
    return {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        **fields,
    }


def some_tokens(seed: int, count: int) -> list[int]:
    """A prompt of ids that are nothing special; no other seed begins like it."""
    rng = Random(seed)
    return [rng.randrange(300, 3000) for _ in range(count)]


async def ask(client: httpx.AsyncClient, request: dict[str, Any], answer: Answer) -> Answer:
    """Stream it to its end, or to its error. A connection that just breaks raises."""
    request = {**request, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=request, timeout=WAIT) as reply:
        answer.status = reply.status_code
        if reply.status_code != 200:
            answer.error = json.loads(await reply.aread())["error"]
            return answer
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                answer.take(line.removeprefix("data: "))
    assert answer.is_done != (answer.error is not None), "a stream ends with [DONE] or with an error"
    return answer


def assert_right(answer: Answer, reference: Answer) -> None:
    """Every token, each once, in order."""
    assert answer.error is None, answer.error
    assert answer.is_done
    assert answer.tokens == reference.tokens
    assert answer.texts == reference.texts
    assert answer.finishes == reference.finishes
    assert answer.completion_tokens == reference.completion_tokens == answer.count


def assert_right_or_refused(answer: Answer, reference: Answer) -> None:
    """Right, or an error that a client can act on after nothing but right tokens."""
    if answer.error is None:
        assert_right(answer, reference)
        return
    assert set(answer.error) >= {"message", "type", "code"} and answer.error["message"], answer.error
    assert answer.status in (200, 429, 500, 503, 504)
    for choice, tokens in answer.tokens.items():
        assert tokens == reference.tokens[choice][: len(tokens)]
        assert reference.texts[choice].startswith(answer.texts[choice])
