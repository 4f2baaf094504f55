"""What a reply says, apart from how it travels: deltas of choices, usage, and the JSON around them.

The two endpoints differ in a Shape. A streamed token costs one string: everything around its text is constant for
its choice, and is written once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring

from router.call import Call
from router.limits import Limits, ServedModel
from router.validation import Fields


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token with its log-probability, for clients that asked for it."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int  # characters of the choice's text before it


@dataclass(slots=True)
class Delta:
    """What one token made certain of its choice."""

    index: int
    text: str = ""
    tokens: list[TokenText] | None = None  # None: no logprobs asked for
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    handoff: dict[str, object] | None = None  # what moving the prompt's pages cost. None: nothing was moved

    def as_json(self) -> dict[str, object]:
        extra = {} if self.handoff is None else {"handoff": self.handoff}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **extra,
        }


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What all parts of one reply share."""

    request_id: str
    created: int
    model: str


TokenJson = tuple[str, ...]  # one token's logprobs: the JSON of one entry for each array of the endpoint's form


class Shape(ABC):
    """How one endpoint reads its body and writes its reply.

    Logprobs become JSON token by token, as they come: thousands of them at once would stall every other stream.
    """

    id_prefix: str
    object_name: str
    chunk_name: str
    closing: str  # after the text, inside the choice

    @abstractmethod
    def parse(self, fields: Fields, model: ServedModel, limits: Limits) -> Call:
        """Raises InvalidRequest."""

    @abstractmethod
    def opening(self, index: int, first: bool) -> str:
        """The JSON of a streamed choice up to its text."""

    @abstractmethod
    def whole_opening(self, index: int) -> str:
        """The same for a choice that is not streamed."""

    @abstractmethod
    def token_json(self, token: TokenText) -> TokenJson: ...

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenJson]) -> str:
        """The JSON object of these tokens' logprobs."""

    def choice(self, index: int, text: str, tokens: Sequence[TokenJson] | None, finish: str | None) -> str:
        """A whole choice, not streamed."""
        logprobs = "null" if tokens is None else self.logprobs(tokens)
        opening = self.whole_opening(index) + encode_basestring(text) + self.closing
        return f'{opening},"logprobs":{logprobs},"finish_reason":{json_text(finish)}}}'

    def body(self, head: ReplyHead, choices: Sequence[str], usage: Usage) -> str:
        opening = self._opening(head, self.object_name)
        return f'{opening}{",".join(choices)}],"usage":{json_text(usage.as_json())}}}'

    def chunk_opening(self, head: ReplyHead) -> str:
        """The JSON of a chunk up to its choices."""
        return self._opening(head, self.chunk_name)

    def _opening(self, head: ReplyHead, name: str) -> str:
        fields = {
            "id": self.id_prefix + head.request_id,
            "object": name,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": None,
        }
        return json_text(fields)[:-1] + ',"choices":['


class ChunkWriter:
    """The chunks of one streamed reply. `include_usage` adds the null that OpenAI puts into all but the last one."""

    def __init__(self, shape: Shape, head: ReplyHead, choices: int, include_usage: bool) -> None:
        self._shape = shape
        self._head = "data: " + shape.chunk_opening(head)
        self._tail = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._first = [True] * choices
        self._openings = [self._head + shape.opening(index, first=False) for index in range(choices)]
        self._plain = f'{shape.closing},"logprobs":null,"finish_reason":null}}]{self._tail}'

    def chunk(self, delta: Delta, usage: Usage | None = None) -> str:
        if delta.finish is None and delta.tokens is None and usage is None and not self._first[delta.index]:
            return self._openings[delta.index] + encode_basestring(delta.text) + self._plain
        return self._rare(delta, usage)

    def _rare(self, delta: Delta, usage: Usage | None) -> str:
        """The first and the last chunk of a choice, and all with logprobs or running usage."""
        opening = self._openings[delta.index]
        if self._first[delta.index]:
            self._first[delta.index] = False
            opening = self._head + self._shape.opening(delta.index, first=True)
        shape = self._shape
        tokens = delta.tokens
        logprobs = "null" if tokens is None else shape.logprobs([shape.token_json(token) for token in tokens])
        finish = "null" if delta.finish is None else f'"{delta.finish}"'
        tail = self._tail if usage is None else f',"usage":{json_text(usage.as_json())}}}\n\n'
        text = encode_basestring(delta.text)
        return f'{opening}{text}{shape.closing},"logprobs":{logprobs},"finish_reason":{finish}}}]{tail}'

    def usage(self, usage: Usage) -> str:
        """The last chunk: no choices, only what was used."""
        return f'{self._head}],"usage":{json_text(usage.as_json())}}}\n\n'


def json_text(value: object) -> str:
    """Compact JSON. Non-ASCII text stays as it is: all of it is valid Unicode by now."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
