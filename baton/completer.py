"""The life of a request without HTTP: the steps of router/handler.py between a Call and a RequestOutput.

The same tokenizer, template, context check, detokenizer and stop filter as behind a server, so the same answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.request_output import CompletionOutput, RequestOutput, TokenLogprob
from core.messages import Token
from router.call import Call
from router.fan_out import generated
from router.generation import GenerationRequest, Generator, Step
from router.output import LEAST_LOGPROB, Output
from router.prompts import Prompts

DEADLINE_S = 30 * 24 * 3600.0  # nobody waits at the other end; a month catches what hangs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of one prompt, tokenized and checked."""

    call: Call
    request: GenerationRequest


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


class Completer:
    """Over any Generator."""

    def __init__(self, prompts: Prompts, generator: Generator) -> None:
        self._prompts = prompts
        self._generator = generator

    async def prepare(self, call: Call) -> Prepared:
        """Raises InvalidRequest and ContextTooLong."""
        assert len(call.prompts) == 1, "one prompt to a request"
        requests = await self._prompts.requests(call, secrets.token_hex(16), DEADLINE_S, lambda: secrets.randbits(63))
        return Prepared(call, requests[0])

    async def complete(self, prepared: Prepared) -> RequestOutput:
        """Raises what the generator raises. Cancelling it frees the pages."""
        call, request = prepared.call, prepared.request
        output = Output(call, [request], self._prompts.tokenizer, self._generator.finish_choice)
        choices = [_Choice() for _ in output.choices]
        async with generated(self._generator, [request]) as steps:
            async for _, step in steps:
                _collect(output, step, choices)
                if output.done:
                    break
        output.check_complete()
        prompt = call.prompts[0]
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=request.prompt_ids,
            outputs=tuple(self._output(i, choice, call) for i, choice in enumerate(choices)),
            cached_tokens=output.cached_tokens(0),
        )

    def _output(self, index: int, choice: _Choice, call: Call) -> CompletionOutput:
        ids = tuple(token.token_id for token in choice.tokens)
        wanted = call.params.logprobs is not None
        logprobs = tuple(self._logprob(token) for token in choice.tokens) if wanted else None
        return CompletionOutput(index, "".join(choice.texts), ids, choice.finish, logprobs)

    def _logprob(self, token: Token) -> TokenLogprob:
        top = tuple((token_id, self._text(token_id), logprob) for token_id, logprob in token.top)
        logprob = LEAST_LOGPROB if token.logprob is None else token.logprob
        return TokenLogprob(token.token_id, self._text(token.token_id), logprob, top)

    def _text(self, token_id: int) -> str:
        return self._prompts.tokenizer.table.piece(token_id).decode("utf-8", "replace")


def _collect(output: Output, step: Step, choices: Sequence[_Choice]) -> None:
    """Token by token, because those past a stop string do not count."""
    for token in step.tokens:
        for delta in output.take(0, Step((token,), step.receipt)):
            choice = choices[delta.index]
            choice.texts.append(delta.text)
            choice.tokens.append(token)
            choice.finish = delta.finish or choice.finish
