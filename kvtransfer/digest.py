"""What the bytes of a page add up to: one digest per segment (one KV head of one page), by a named algorithm.

xxh3 catches what hardware, software and races do to bytes. It is no defence against a peer that forges: a keyed
BLAKE3 can join the table for that, which is why the algorithm's id travels in the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable

import xxhash

from core.errors import FingerprintMismatch
from core.layout import PageLayout

XXH3_64 = "xxh3-64"

SegmentDigest = Callable[[memoryview], bytes]  # always of the same length
ALGORITHMS: dict[str, SegmentDigest] = {XXH3_64: xxhash.xxh3_64_digest}  # releases the GIL


def algorithm(name: str) -> SegmentDigest:
    """Raises FingerprintMismatch for an id that this version does not know."""
    found = ALGORITHMS.get(name)
    if found is None:
        raise FingerprintMismatch(f"unknown digest {name!r}; known: {', '.join(ALGORITHMS)}")
    return found


def digest_page(buffer: memoryview, layout: PageLayout, page: int, of: SegmentDigest) -> bytes:
    """The digests of one page of a pool's buffer, one per KV head, one after the other."""
    start, size = page * layout.page_bytes, layout.segment_bytes
    return b"".join([of(buffer[at : at + size]) for at in range(start, start + layout.page_bytes, size)])
