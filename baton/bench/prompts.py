"""What is asked: random prompts of an exact number of tokens, the same for the same seed, no two with a common prefix.

Where the vocabulary allows, a prompt is a row of whole words: each is one token by itself and after any other, so the
server counts as many tokens as were drawn. Elsewhere a prompt is drawn, encoded and cut until it fits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import ConfigError

MIN_WORDS = 64  # fewer make prompts too much alike
FITTING_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    ids: tuple[int, ...]  # with nothing that the server would add


def load_tokenizer(place: str) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, or a tokenizer.json. Raises ConfigError."""
    path = Path(place)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--tokenizer: no tokenizer.json at {place}")
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"--tokenizer: {path} cannot be read: {error}") from error


class RandomPrompts:
    """Draws prompts of `tokens` tokens as the server counts them, those that it adds itself included."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._tokens = tokens - tokenizer.num_special_tokens_to_add(False)
        if self._tokens < 1:
            raise ConfigError(f"--input-tokens must be above {tokens - self._tokens}, the tokens that the server adds")
        plain = _plain_ids(tokenizer)
        words = _word_ids(tokenizer, plain)
        self._choices = words if len(words) >= MIN_WORDS else plain

    def draw(self) -> Prompt:
        ids = self._pick(self._tokens)
        for _ in range(FITTING_ROUNDS):
            text = self._tokenizer.decode(ids)
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == self._tokens:
                break
            ids = ids[: self._tokens] + self._pick(max(0, self._tokens - len(ids)))
        return Prompt(text, tuple(ids))

    def _pick(self, count: int) -> list[int]:
        return self._rng.choices(self._choices, k=count)


def _plain_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that mean text by themselves: no special ones, no pieces of a character."""
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = [id_ for id_ in range(tokenizer.get_vocab_size()) if id_ not in special]
    texts = tokenizer.decode_batch([[id_] for id_ in ids])
    return [id_ for id_, text in zip(ids, texts, strict=True) if text and "\ufffd" not in text]


def _word_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Those of the ids that are a space and a whole word, and stay one token when the word stands twice."""
    texts = tokenizer.decode_batch([[id_] for id_ in ids])
    words = [(id_, text) for id_, text in zip(ids, texts, strict=True) if text[:1] == " " and text[1:].isalpha()]
    encoded = tokenizer.encode_batch([text * 2 for _, text in words], add_special_tokens=False)
    return [id_ for (id_, _), encoding in zip(words, encoded, strict=True) if encoding.ids == [id_, id_]]
