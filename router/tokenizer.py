"""Text to token ids and back, with the model's own tokenizer and chat template.

Long texts are encoded on threads of their own, without the interpreter lock, so that no stream stalls meanwhile.
In a conversation only the template may write control tokens: where a message spells one, it is encoded as the plain
characters that it is.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import CheckpointError, InvalidRequest, QueueFull
from router.call import Conversation
from router.chat_template import ChatTemplate
from router.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer, piece_table

LONG_TEXT_CHARS = 4096  # encoded on a thread from here on: below it, the hop costs more than the work
ENCODING_THREADS = 2
MAX_PENDING = 64
NORMALIZER_SHRINKS = 4  # Unicode normal forms never join more characters into one
SPLIT_MARKS = tuple(chr(0xFDD0 + i) for i in range(32))  # noncharacters: text that is meant to be read has none


class ModelTokenizer:
    """The tokenizer of one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._pool = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encode")
        self._pending = 0
        self.table = piece_table(tokenizer)
        self._control = _control_pattern(tokenizer, self.table.special)
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._longest_token = longest * (NORMALIZER_SHRINKS if tokenizer.normalizer is not None else 1)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, without encoding: it refuses the hopelessly long at once."""
        return len(text) // self._longest_token

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises QueueFull when too many long texts are waiting."""
        if len(text) < LONG_TEXT_CHARS:
            return self.encode_now(text, add_special_tokens)
        if self._pending >= MAX_PENDING:
            raise QueueFull("too many long prompts are waiting to be tokenized", retry_after_s=1.0)
        self._pending += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self.encode_now, text, add_special_tokens)
        finally:
            self._pending -= 1

    async def encode_parts(self, parts: Sequence[str], add_special_tokens: bool = False) -> list[int]:
        """A rendered conversation. No control token reaches over the border of two parts."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += await self.encode(part, add_special_tokens and i == 0)
        return ids

    def encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        # encode() holds the interpreter lock for all of it; this one lets go, and leaves the offsets out.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def render(self, conversation: Conversation) -> list[str]:
        """The conversation's text, in parts: divided inside each control token that a message spells."""
        if self._template is None:
            raise InvalidRequest("messages: this model has no chat template; use /v1/completions", param="messages")
        if self._control.search(json.dumps(dict(conversation.template_values), ensure_ascii=False)):
            param = "chat_template_kwargs"
            raise InvalidRequest(f"{param}: must not spell control tokens", param=param)
        texts = [text for message in conversation.messages for text in message.values() if isinstance(text, str)]
        if not any(self._control.search(text) for text in texts):
            return [self._template.render(conversation)]
        mark = next((mark for mark in SPLIT_MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise InvalidRequest("messages: hold too many kinds of Unicode noncharacters", param="messages")
        marked = tuple(self._without_control(message, mark) for message in conversation.messages)
        return self._template.render(replace(conversation, messages=marked)).split(mark)

    def _without_control(self, message: Mapping[str, object], mark: str) -> dict[str, object]:
        return {
            name: self._control.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", value)
            if isinstance(value, str)
            else value
            for name, value in message.items()
        }

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def json(self) -> str:
        """The tokenizer as its file has it."""
        return str(self._tokenizer.to_str())

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh one for each choice."""
        if self.table.exact:
            return ByteDetokenizer(self.table, skip_special_tokens)
        return WindowDetokenizer(self._tokenizer, skip_special_tokens)


def load_tokenizer(folder: Path, now: Callable[[], datetime] = datetime.now) -> ModelTokenizer:
    """Reads a checkpoint's tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: Baton needs a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    special = {name: text for name in config if name.endswith("_token") and (text := _token_text(config[name]))}
    return ModelTokenizer(tokenizer, None if source is None else ChatTemplate(source, special, now))


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def _template_source(folder: Path, config: Mapping[str, object]) -> str | None:
    """chat_template.jinja goes before the one in tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _control_pattern(tokenizer: Tokenizer, special: frozenset[int]) -> re.Pattern[str]:
    """Matches any special token of two characters or more, the longest first."""
    added = tokenizer.get_added_tokens_decoder()
    texts = [added[token_id].content for token_id in special]
    texts = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
