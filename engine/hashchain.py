"""A model engine without a model: the next token is a hash of all ids and of the KV bytes read from the pages.

Any stale, foreign, missing or corrupt page changes every later token, which makes it the oracle of the simulation: run
the same prompt through `reference_tokens`, which never touches a page, and compare.

The KV of position p is BLAKE2b(id_p, p), cut to the bytes that one token has in a segment of each head. The sampled
id is BLAKE2b(all ids, all KV bytes as read, seed, choice, position) modulo the vocabulary; a greedy one has no seed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from core.layout import PageLayout
from core.sampling import SamplingParams
from engine.batch import Batch, Row, RowResult, SampledToken, SampleSpec

LAYOUT = PageLayout(kv_heads=2, layers=1, page_size=16, head_dim=2, dtype="uint8")
_TOKEN_BYTES = LAYOUT.page_bytes // LAYOUT.page_size


def kv_of(token_id: int, position: int) -> bytes:
    """What one position leaves in the pool, all heads together."""
    return hashlib.blake2b(
        token_id.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=_TOKEN_BYTES
    ).digest()


def next_token(ids: Sequence[int], kv: bytes, spec_seed: int, choice: int, vocabulary: int) -> int:
    h = hashlib.blake2b(array("q", ids).tobytes(), digest_size=8)
    h.update(kv)
    h.update(f"{spec_seed}/{choice}/{len(ids)}".encode())
    return int.from_bytes(h.digest(), "little") % vocabulary


def reference_tokens(
    prompt: Sequence[int], params: SamplingParams, seed: int, choice: int, vocabulary: int, end_ids: Sequence[int] = ()
) -> list[int]:
    """What a fault-free run gives for one choice."""
    ids = list(prompt)
    kv = b"".join(kv_of(token_id, position) for position, token_id in enumerate(ids))
    noise_seed = 0 if params.is_greedy else seed
    while len(ids) - len(prompt) < params.max_tokens:
        token_id = next_token(ids, kv, noise_seed, 0 if params.is_greedy else choice, vocabulary)
        kv += kv_of(token_id, len(ids))
        ids.append(token_id)
        if token_id in end_ids and not params.ignore_eos:
            break
    return ids[len(prompt) :]


class HashChainExecutor:
    """An engine.batch.Executor over any frames of LAYOUT."""

    layout = LAYOUT

    def __init__(self, frames: memoryview, vocabulary: int = 1000) -> None:
        blocks = LAYOUT.kv_heads * LAYOUT.parts
        self._pages = np.frombuffer(frames, np.uint8).reshape(-1, blocks, LAYOUT.page_size, LAYOUT.head_dim)
        self._vocabulary = vocabulary

    def execute(self, batch: Batch) -> list[RowResult]:
        for copy in batch.copies:
            self._pages[copy.target] = self._pages[copy.source]
        for row in batch.rows:
            for offset, token_id in enumerate(row.ids):
                self._write(row.pages, row.start + offset, kv_of(token_id, row.start + offset))
        return [self._sample(row) for row in batch.rows]

    def zero_tail(self, page: int, used_tokens: int) -> None:
        self._pages[page, :, used_tokens:] = 0

    def _sample(self, row: Row) -> RowResult:
        if row.sample is None:
            return RowResult()
        kv = self._read(row.pages, row.start + len(row.ids))
        return RowResult(tuple(self._choose(row.sample, kv, choice) for choice in row.sample.choices))

    def _choose(self, spec: SampleSpec, kv: bytes, choice: int) -> SampledToken:
        greedy = spec.params.is_greedy
        seed, choice = (0, 0) if greedy else (spec.seed, choice)
        return SampledToken(next_token(spec.history, kv, seed, choice, self._vocabulary))

    def _write(self, pages: Sequence[int], position: int, kv: bytes) -> None:
        """Per head and part, head_dim bytes."""
        page, slot = divmod(position, LAYOUT.page_size)
        self._pages[pages[page], :, slot] = np.frombuffer(kv, np.uint8).reshape(-1, LAYOUT.head_dim)

    def _read(self, pages: Sequence[int], tokens: int) -> bytes:
        """The KV of the first `tokens` positions, in their order."""
        found = self._pages[list(pages[: LAYOUT.pages_for(tokens)])]
        return found.transpose(0, 2, 1, 3).tobytes()[: tokens * _TOKEN_BYTES]
