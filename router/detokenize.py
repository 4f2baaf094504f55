"""Which text a token id stands for, and when a choice's bytes have become whole characters.

A tokenizer's decoder is read once into a table of bytes per id. Decoding a token is then a look-up and a step of an
incremental UTF-8 decoder: constant time, never half a character, and equal to decoding the whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WINDOW_TOKENS = 8  # no character is spread over more tokens


class Detokenizer(Protocol):
    """The text of one choice, token by token."""

    def feed(self, token_id: int) -> str:
        """The characters that this token completes."""
        ...

    def flush(self) -> str:
        """The choice has ended: an incomplete character becomes U+FFFD."""
        ...


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The bytes of every id. `exact`: they concatenate to the text; otherwise they are for display only."""

    pieces: Sequence[bytes]
    special: frozenset[int]
    exact: bool

    def piece(self, token_id: int) -> bytes:
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""


class ByteDetokenizer:
    """For decoders whose text is the concatenation of their pieces: byte-level, and SentencePiece with bytes."""

    __slots__ = ("_decode", "_pieces", "_size", "_skip")

    def __init__(self, table: PieceTable, skip_special: bool) -> None:
        self._pieces = table.pieces
        self._size = len(table.pieces)
        self._skip = table.special if skip_special else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token_id: int) -> str:
        if token_id in self._skip or not 0 <= token_id < self._size:
            return ""
        return self._decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other decoder: decodes the last tokens again with each new one, and gives out what is new."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._before: list[int] = []  # given out; the context that decides the spaces
        self._window: list[int] = []  # not yet whole

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        if text.endswith("�") and len(self._window) < WINDOW_TOKENS:
            return ""
        self._before, self._window = self._window[-WINDOW_TOKENS:], []
        return text

    def flush(self) -> str:
        text = self._new_text() if self._window else ""
        self._window = []
        return text

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._before, skip_special_tokens=self._skip_special)
        whole = self._tokenizer.decode(self._before + self._window, skip_special_tokens=self._skip_special)
        return whole[len(known) :]


def piece_table(tokenizer: Tokenizer) -> PieceTable:
    """Reads the tokenizer's decoder. Takes tenths of a second for 150,000 ids: once, at start."""
    parsed = json.loads(tokenizer.to_str())
    decoders = list(_flat(parsed.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    special = frozenset(token["id"] for token in parsed["added_tokens"] if token["special"])
    added = {token["id"]: token["content"] for token in parsed["added_tokens"]}
    size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added)])
    tokens = [added.get(i) or tokenizer.id_to_token(i) or "" for i in range(size)]
    if kinds == {"ByteLevel"}:
        letters = _byte_of_letter()
        return PieceTable([_byte_level(token, letters) for token in tokens], special, exact=True)
    if _is_sentencepiece(decoders):
        return PieceTable([_sentencepiece(token, decoders) for token in tokens], special, exact=True)
    return PieceTable([token.encode() for token in tokens], special, exact=False)


def _flat(decoder: Mapping[str, object] | None) -> Iterator[dict[str, object]]:
    """The decoders of nested sequences, in order."""
    if decoder is None:
        return
    nested = decoder.get("decoders")
    if isinstance(nested, list):
        for child in nested:
            yield from _flat(child)
    else:
        yield dict(decoder)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letter, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str, letters: Mapping[str, int]) -> bytes:
    """A token with a letter outside the alphabet (an added one) stands for itself."""
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:
        return token.encode()


def _is_sentencepiece(decoders: Sequence[Mapping[str, object]]) -> bool:
    """Llama 2's kind: letters replaced one by one, and byte tokens. Its Strip takes the space that begins a text:
    not ours, which goes on after a prompt."""
    kinds = {decoder["type"] for decoder in decoders}
    patterns = [decoder["pattern"] for decoder in decoders if decoder["type"] == "Replace"]
    plain = all(isinstance(pattern, dict) and "String" in pattern for pattern in patterns)
    return plain and "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _sentencepiece(token: str, decoders: Sequence[Mapping[str, object]]) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    for decoder in decoders:
        if decoder["type"] == "Metaspace":
            token = token.replace(str(decoder["replacement"]), " ")
        elif decoder["type"] == "Replace":
            pattern = decoder["pattern"]
            assert isinstance(pattern, dict)
            token = token.replace(str(pattern["String"]), str(decoder["content"]))
    return token.encode()
