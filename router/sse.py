"""How a call's steps reach the client: as events while they come, or as one reply at the end.

    data: {chunk}     for each token that makes text certain, and for each end of a choice
    data: {usage}     when stream_options.include_usage asks for it
    data: [DONE]      after every choice has its finish reason

An error takes the place of [DONE]: a stream that was cut never looks like one that is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from router.call import Call
from router.connection import Connection
from router.generation import Step
from router.output import Output
from router.reply import ChunkWriter, Delta, ReplyHead, Shape, TokenJson

DONE = "data: [DONE]\n\n"


class ReplyWriter(Protocol):
    async def take(self, number: int, step: Step) -> None:
        """A step of request `number`. Waits while the client reads slowly."""
        ...

    async def end(self) -> None:
        """Every choice has ended."""
        ...


@dataclass(frozen=True, slots=True)
class ReplyParts:
    """What a writer is made of. `echo`: the prompts' texts, where the client wants them first."""

    call: Call
    shape: Shape
    head: ReplyHead
    output: Output
    echo: list[str]

    def echo_of(self, index: int) -> str:
        return self.echo[index // self.call.params.n] if self.echo else ""


class EventStream:
    """Writes events while the tokens come."""

    def __init__(self, parts: ReplyParts, connection: Connection) -> None:
        call = parts.call
        self._parts = parts
        self._output = parts.output
        self._connection = connection
        self._chunks = ChunkWriter(parts.shape, parts.head, call.choices, call.include_usage)
        self._opened = [False] * call.choices
        self._running_usage = call.continuous_usage

    async def take(self, number: int, step: Step) -> None:
        deltas = self._output.take(number, step)
        text = self._event(deltas[0]) if len(deltas) == 1 else "".join([self._event(d) for d in deltas])
        if text:
            await self._connection.write(text)

    def _event(self, delta: Delta) -> str:
        """May be empty: text that is held back is not worth an event."""
        if not self._opened[delta.index]:
            self._opened[delta.index] = True
            delta.text = self._parts.echo_of(delta.index) + delta.text
        elif not delta.text and delta.finish is None and delta.tokens is None:
            return ""
        return self._chunks.chunk(delta, self._output.usage() if self._running_usage else None)

    async def end(self) -> None:
        usage = self._chunks.usage(self._output.usage()) if self._parts.call.include_usage else ""
        await self._connection.write(usage + DONE)
        await self._connection.end()


class WholeReply:
    """Collects the choices, and replies once."""

    def __init__(self, parts: ReplyParts, connection: Connection) -> None:
        choices = range(parts.call.choices)
        self._parts = parts
        self._connection = connection
        self._texts = [[parts.echo_of(index)] for index in choices]
        self._tokens: list[list[TokenJson]] | None = None
        if parts.call.params.logprobs is not None:
            self._tokens = [[] for _ in choices]

    async def take(self, number: int, step: Step) -> None:
        for delta in self._parts.output.take(number, step):
            self._texts[delta.index].append(delta.text)
            if self._tokens is not None and delta.tokens is not None:
                self._tokens[delta.index] += [self._parts.shape.token_json(token) for token in delta.tokens]

    async def end(self) -> None:
        parts = self._parts
        choices = [
            parts.shape.choice(
                choice.index,
                "".join(self._texts[choice.index]),
                None if self._tokens is None else self._tokens[choice.index],
                choice.finish,
            )
            for choice in parts.output.choices
        ]
        await self._connection.reply(200, parts.shape.body(parts.head, choices, parts.output.usage()))
