"""What the bytes of a page add up to: one digest per segment (one KV head of one page), by a named algorithm.

xxh3 catches what hardware, software and races do to bytes. It is no defence against whoever can write into the fabric:
they change the bytes and the digest. Keyed BLAKE3 is: without the key there is no digest to forge. Two workers compare
the names of their digests before any byte moves, so the name of a keyed one tells its key from others, and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import blake3
import xxhash

from core.errors import FingerprintMismatch
from core.layout import PageLayout

XXH3_64 = "xxh3-64"
BLAKE3 = "blake3"
BLAKE3_BYTES = 16  # of 32: nobody guesses 128 bits within the life of a page
CHECK_BYTES = 4  # of a key's name

SegmentDigest = Callable[[memoryview], bytes]  # always of the same length; releases the GIL
ALGORITHMS: dict[str, SegmentDigest] = {XXH3_64: xxhash.xxh3_64_digest}


@dataclass(frozen=True, slots=True)
class Digest:
    """`name` travels in the fingerprint."""

    name: str
    of: SegmentDigest

    @property
    def width(self) -> int:
        """Bytes of one digest."""
        return len(self.of(memoryview(b"")))


def algorithm(name: str) -> SegmentDigest:
    """Raises FingerprintMismatch for an id that this version does not know."""
    found = ALGORITHMS.get(name)
    if found is None:
        raise FingerprintMismatch(f"unknown digest {name!r}; known: {', '.join(ALGORITHMS)}")
    return found


def plain() -> Digest:
    return Digest(XXH3_64, ALGORITHMS[XXH3_64])


def keyed(key: bytes) -> Digest:
    """BLAKE3 under a key of 32 bytes. Its name holds a value that only equal keys have in common."""

    def of(segment: memoryview) -> bytes:
        return blake3.blake3(segment, key=key).digest(length=BLAKE3_BYTES)

    check = blake3.blake3(b"which key is this", key=key).digest(length=CHECK_BYTES)
    return Digest(f"{BLAKE3}:{check.hex()}", of)


def digest_page(buffer: memoryview, layout: PageLayout, page: int, of: SegmentDigest) -> bytes:
    """The digests of one page of a pool's buffer, one per KV head, one after the other."""
    size = layout.segment_bytes
    start, end = page * layout.kv_heads * size, (page + 1) * layout.kv_heads * size
    return b"".join([of(buffer[at : at + size]) for at in range(start, end, size)])
