"""Incremental text equals the text of the whole, for every decoder that checkpoints come with."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_front import VOCAB, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from router.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer, piece_table

TINY = tiny_tokenizer()
TEXT = "Hello wörld, 日本語 العربية 😀👩‍👩‍👧 é naïve \n\t ½ \U0001f9d1\u200d\U0001f680"


def byte_level_with_added() -> Tokenizer:
    """A byte-level vocabulary whose added tokens are outside of its alphabet, plain, special, or both at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("a b"), AddedToken("日本"), AddedToken("é")])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("< end >", special=True)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces as U+2581, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁", "w", "ör", "ld", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "play", "##ing", "##ed", "the", ",", "日", "##本"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def concatenated(detokenizer: Detokenizer, ids: Iterable[int]) -> str:
    parts = [detokenizer.feed(token_id) for token_id in ids]
    return "".join(parts) + detokenizer.flush()


def incremental(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    table = piece_table(tokenizer)
    assert table.exact
    return concatenated(ByteDetokenizer(table, skip_special), ids)


BYTE_LEVEL, SENTENCEPIECE, WORD_PIECE = byte_level_with_added(), sentencepiece(), word_piece()


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40), st.booleans())
@settings(max_examples=300)
def test_byte_level_equals_the_whole_for_any_ids(ids: list[int], skip: bool) -> None:
    assert concatenated(TINY.detokenizer(skip), ids) == TINY.decode(ids, skip)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30), st.booleans())
@settings(max_examples=300)
def test_added_tokens_and_unknown_ids_read_as_in_the_library(ids: list[int], skip: bool) -> None:
    assert incremental(BYTE_LEVEL, ids, skip) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_any_text_comes_back_and_never_in_half_characters(text: str) -> None:
    detokenizer = TINY.detokenizer()
    parts = [detokenizer.feed(i) for i in TINY.encode_now(text, add_special_tokens=False)]
    assert not any("�" in part for part in parts) or "�" in text
    assert "".join(parts) + detokenizer.flush() == text


@given(st.lists(st.sampled_from(["▁Hello", "▁", "w", "ör", "ld", "▁▁", "日", "é", "😀", "<s>", "</s>"]), max_size=20))
def test_sentencepiece_equals_the_whole(pieces: list[str]) -> None:
    ids = [token_id for piece in pieces for token_id in sentencepiece_ids(piece)]
    # Skipped special tokens are no border for bytes: they are skipped before decoding, here as in the library.
    assert incremental(SENTENCEPIECE, ids, True) == SENTENCEPIECE.decode(ids)


def sentencepiece_ids(piece: str) -> list[int]:
    known = SENTENCEPIECE.token_to_id(piece)
    return [known] if known is not None else [3 + byte for byte in piece.encode()]


def test_ill_formed_bytes_keep_the_characters_before_them() -> None:
    """The library turns a whole run of bytes into U+FFFD when one is wrong: that cannot be known while streaming."""
    ids = [3 + byte for byte in "日".encode() + b"\xff"]
    assert incremental(SENTENCEPIECE, ids, True) == "日�"


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    ids = TINY.encode_now("😀", add_special_tokens=False)
    detokenizer = TINY.detokenizer()
    assert len(ids) > 1, "the test needs a character of several tokens"
    assert "".join(detokenizer.feed(i) for i in ids[:-1]) == ""
    assert detokenizer.flush() == "�"


@pytest.mark.parametrize("ids", [[1, 2, 5, 4, 1, 3], [6, 7, 6, 7], [4], []])
def test_other_decoders_go_through_a_window(ids: list[int]) -> None:
    assert not piece_table(WORD_PIECE).exact
    assert concatenated(WindowDetokenizer(WORD_PIECE, True), ids) == WORD_PIECE.decode(ids)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=60))
@settings(max_examples=100)
def test_a_window_is_enough_for_text(ids: list[int]) -> None:
    ids = TINY.encode_now(TINY.decode(ids).replace("�", ""), add_special_tokens=False)
    tokenizer = Tokenizer.from_str(TINY.json())
    assert concatenated(WindowDetokenizer(tokenizer, True), ids) == TINY.decode(ids)


def test_text_of_many_scripts() -> None:
    ids = TINY.encode_now(TEXT, add_special_tokens=False)
    assert concatenated(TINY.detokenizer(), ids) == TEXT
