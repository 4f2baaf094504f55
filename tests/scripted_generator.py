"""A Generator that says what a test tells it: tokens, delays, errors. It records what it was asked and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import BatonError
from core.messages import FinishReason, Receipt, Token
from router.generation import GenerationRequest, Step


@dataclass
class ScriptedGenerator:
    """Every choice says `ids`, one token a step, then ends with `finish`."""

    ids: Sequence[int] = ()
    finish: FinishReason = FinishReason.STOP
    cached: int = 0
    moved: Mapping[str, Any] = field(default_factory=dict)  # what its receipts say of a hand-off
    delay_s: float = 0.0
    fails: BatonError | None = None  # raised before token `fails_at`
    fails_at: int = 0
    endless: bool = False
    top: Callable[[int], tuple[tuple[int, float], ...]] = lambda token_id: ()
    requests: list[GenerationRequest] = field(default_factory=list)
    finished_choices: list[tuple[str, int]] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Step]:
        self.requests.append(request)
        self.running += 1
        whole = False
        try:
            for position in range(min(request.params.max_tokens, self._length())):
                if self.fails is not None and position == self.fails_at:
                    raise self.fails
                if self.delay_s or self.endless:
                    await asyncio.sleep(self.delay_s)
                yield self._step(request, position)
            whole = True
        finally:
            self.running -= 1
            self.cancelled += not whole

    def _length(self) -> int:
        return 10**9 if self.endless else len(self.ids)

    def _step(self, request: GenerationRequest, position: int) -> Step:
        token_id = self.ids[position % len(self.ids)]
        last = position + 1 == min(request.params.max_tokens, self._length())
        cut = position + 1 == request.params.max_tokens and position + 1 < self._length()
        finish = (FinishReason.LENGTH if cut else self.finish) if last else None
        logprob = -0.5 if request.params.logprobs is not None else None
        top = self.top(token_id)[: request.params.logprobs or 0]
        ended = {choice for name, choice in self.finished_choices if name == request.request_id}
        tokens = tuple(
            Token(choice, position, token_id, logprob, top, finish)
            for choice in range(request.params.n)
            if choice not in ended
        )
        computed = len(request.prompt_ids) - self.cached
        receipt = Receipt(cached_prefill_tokens=self.cached, computed_tokens=computed, **self.moved)
        return Step(tokens, receipt if position == 0 else None)

    def finish_choice(self, request_id: str, choice: int) -> None:
        self.finished_choices.append((request_id, choice))
