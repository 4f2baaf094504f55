"""What happened to one request, and when: the request is sent, and each chunk of its answer is timed as it arrives.

The definitions are those of `vllm bench serve`: a chunk is an event with a choice, also one without text; the request
ends with its last chunk; the server's usage says how many tokens it had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

from baton.endpoint import error_message, error_text
from baton.sse import DONE, EventReader
from core.clock import Clock


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished request. Times are seconds of the clock that was passed in."""

    sent_s: float
    chunks_s: tuple[float, ...]  # when each chunk arrived
    input_tokens: int
    output_tokens: int
    error: str = ""  # why it failed; empty when it did not

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.chunks_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """The mean time per token after the first one; 0 when there is no second."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl_s(self) -> tuple[float, ...]:
        """The gaps between chunks."""
        return tuple(later - earlier for earlier, later in pairwise(self.chunks_s))


class Recording:
    """The answer so far: pure, fed with the bytes and the time of their arrival."""

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._chunks_s: list[float] = []
        self._usage: Mapping[str, Any] = {}
        self._error = ""
        self._done = False
        self._reader = EventReader()

    def feed(self, data: bytes, now_s: float) -> None:
        for event in self._reader.feed(data):
            if event == DONE:
                self._done = True
            else:
                self._take(json.loads(event), now_s)

    def _take(self, event: Mapping[str, Any], now_s: float) -> None:
        if "error" in event:
            self._error = error_message(json.dumps(event).encode())
        if (choices := event.get("choices")) and not _only_names_the_role(choices[0]):
            self._chunks_s.append(now_s)
        self._usage = event.get("usage") or self._usage

    def outcome(self, error: str = "") -> Outcome:
        """What became of the request: an answer without a chunk, or cut short, has failed."""
        failure = error or self._error
        if not failure and not self._done:
            failure = "the stream ended before [DONE]"
        if not failure and not self._chunks_s:
            failure = "the answer had no choice"
        return Outcome(
            sent_s=self._sent_s,
            chunks_s=tuple(self._chunks_s),
            input_tokens=int(self._usage.get("prompt_tokens", 0)),
            output_tokens=int(self._usage.get("completion_tokens", len(self._chunks_s))),
            error=failure,
        )


def _only_names_the_role(choice: Mapping[str, Any]) -> bool:
    """A chat answer opens with the role of who speaks. Servers may send it before any token: it is no first token."""
    delta = choice.get("delta") or {}
    return "role" in delta and not delta.get("content") and choice.get("finish_reason") is None


async def timed_request(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], clock: Clock) -> Outcome:
    """Sends one streaming request and times its answer. A failure is an outcome, never an exception."""
    recording = Recording(clock())
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                return recording.outcome(f"HTTP {response.status}: {error_message(await response.read())}")
            async for data in response.content.iter_any():
                recording.feed(data, clock())
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return recording.outcome(error_text(error))
    return recording.outcome()
