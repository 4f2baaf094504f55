"""Where a page belongs: which page of which prompt. Computed by each end from its own token ids, never believed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import PlaceMismatch
from core.hashing import HASH_BYTES


@dataclass(frozen=True, slots=True)
class FilledPage:
    """A page that the engine has written, all of it: what `HandoffSource.ready` takes."""

    position: int  # page index in the prompt
    block_hash: bytes
    page: int  # frame of the pool


@dataclass(frozen=True, slots=True)
class Places:
    """The name of each page of one prompt."""

    prompt_tokens: int
    page_size: int
    hashes: tuple[bytes, ...]  # of the full pages
    tail: bytes  # of the partly filled one; empty: there is none

    @property
    def full_pages(self) -> int:
        return self.prompt_tokens // self.page_size

    @property
    def pages(self) -> int:
        return -(-self.prompt_tokens // self.page_size)

    @property
    def tail_tokens(self) -> int:
        return self.prompt_tokens % self.page_size

    def first(self, tokens: int) -> Places:
        """The places of so many of the prompt's first tokens, whole pages of them."""
        assert tokens % self.page_size == 0 and tokens <= self.prompt_tokens, (tokens, self.prompt_tokens)
        return Places(tokens, self.page_size, self.hashes[: tokens // self.page_size], b"")

    def check(self, position: int, block_hash: bytes) -> None:
        """Raise PlaceMismatch unless that page of this prompt has this name."""
        if not 0 <= position < self.pages:
            raise PlaceMismatch(f"page {position} of a prompt of {self.pages} pages")
        mine = self.hashes[position] if position < len(self.hashes) else self.tail
        if mine != block_hash:
            raise PlaceMismatch(f"page {position} is {block_hash.hex()}, the prompt has {mine.hex()} there")


def places_of(prompt_ids: Sequence[int], block_hashes: Sequence[bytes], page_size: int) -> Places:
    """`block_hashes` are those of the full pages (core.hashing.block_hashes)."""
    full = len(prompt_ids) // page_size
    assert len(block_hashes) >= full, (len(block_hashes), full)
    hashes = tuple(block_hashes[:full])
    tail = tail_hash(hashes, prompt_ids[full * page_size :])
    return Places(len(prompt_ids), page_size, hashes, tail)


def tail_hash(full_hashes: Sequence[bytes], tail_ids: Sequence[int]) -> bytes:
    """The name of the partly filled last page: its ids after the last full page. Empty when there is no such page.

    It is no block hash: the page never enters a prefix cache under it.
    """
    if not tail_ids:
        return b""
    parent = full_hashes[-1] if full_hashes else b""
    return hashlib.blake2b(parent + array("I", tail_ids).tobytes(), digest_size=HASH_BYTES, person=b"tail").digest()
