"""What `baton chat` does: a conversation in the terminal, streamed, with its history sent again at every turn.

Ctrl-C stops the answer that is being written and keeps what was said so far; at the prompt it clears the line.
Without a terminal each line of the input is one turn, and the first failure ends the conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp

from baton import endpoint as endpoints
from baton.endpoint import Endpoint, error_message, error_text
from baton.sse import DONE, EventReader
from core.errors import BatonError, RequestError, WorkerLost

IDLE_S = 600.0  # a server that says nothing for so long is given up
HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer"

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endpoints.add_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")


def run(args: argparse.Namespace) -> int:
    endpoint = endpoints.from_args(args)
    options = {"temperature": args.temperature, "max_completion_tokens": args.max_tokens}
    start: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    with asyncio.Runner() as runner:
        model = args.model or runner.run(_find_model(endpoint))
        chosen = {name: value for name, value in options.items() if value is not None}
        conversation = Conversation(endpoint, {"model": model, **chosen}, start)
        if sys.stdin.isatty():
            print(f"{model} at {endpoint.base_url}. {HELP}.")
        return _converse(runner, conversation)


async def _find_model(endpoint: Endpoint) -> str:
    async with endpoints.open_session(endpoint, idle_s=IDLE_S) as session:
        return await endpoints.served_model(session, endpoint)


def _converse(runner: asyncio.Runner, conversation: Conversation) -> int:
    """One turn after another, until the input ends or says so."""
    interactive = sys.stdin.isatty()
    for line in _lines(interactive):
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(HELP)
        elif line:
            try:
                runner.run(_say(conversation, line))
            except KeyboardInterrupt:
                print("\n[stopped]")
            except BatonError as error:
                if not interactive:
                    raise
                print(f"[{error.message}]", file=sys.stderr)
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    """What the person types, or the lines of a pipe."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401 - imported for its effect: input() can then edit the line and recall earlier ones

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


async def _say(conversation: Conversation, text: str) -> None:
    """Prints the answer piece by piece."""
    try:
        async for piece in conversation.ask(text):
            print(piece, end="", flush=True)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise WorkerLost(f"the server is gone: {error_text(error)}") from error
    except ValueError as error:
        raise WorkerLost(f"the server sent something else than an answer: {error}") from error
    print()


class Conversation:
    """The messages so far. A turn that failed before its first word leaves no trace."""

    def __init__(self, endpoint: Endpoint, options: Mapping[str, Any], start: list[Message]) -> None:
        self._endpoint = endpoint
        self._options = options
        self._start = start
        self.messages = list(start)

    def reset(self) -> None:
        self.messages = list(self._start)

    async def ask(self, text: str) -> AsyncIterator[str]:
        """Yields the answer's pieces. However the turn ends, what was said becomes part of the history."""
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            async with endpoints.open_session(self._endpoint, idle_s=IDLE_S) as session:
                body = {**self._options, "messages": messages, "stream": True}
                async with session.post(self._endpoint.url("chat/completions"), json=body) as response:
                    if response.status != 200:
                        raise RequestError(error_message(await response.read()))
                    async for piece in _pieces(response.content):
                        pieces.append(piece)
                        yield piece
        finally:
            if pieces:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """The text of a streamed chat answer. Raises WorkerLost when the stream says so or ends too early."""
    reader = EventReader()
    async for data in content.iter_any():
        for event in reader.feed(data):
            if event == DONE:
                return
            message = json.loads(event)
            if "error" in message:
                raise WorkerLost(error_message(event))
            for choice in message.get("choices", ()):
                if piece := choice.get("delta", {}).get("content"):
                    yield piece
    raise WorkerLost("the answer was cut short")
