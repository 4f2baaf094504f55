"""The geometry of one page: strides over heads, layers, parts, tokens. The bytes that engine and hand-off agree on.

The default is the dense frame [K, L, 2, P, D]: heads outermost, so that one KV head of one page (a segment) is one
contiguous run of bytes, and a tensor-parallel re-shard is a slice of the page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HASH_UNIT_TOKENS = 16  # a constant of the wire version: block hashes chain over units of this many tokens

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """[kv_heads, layers, parts, page_size, head_dim] of `dtype`, dense, in this order."""

    kv_heads: int
    layers: int
    page_size: int  # tokens; a multiple of HASH_UNIT_TOKENS
    head_dim: int
    dtype: str
    parts: int = 2  # K and V

    def __post_init__(self) -> None:
        assert self.page_size % HASH_UNIT_TOKENS == 0, self.page_size
        assert self.dtype in ITEM_BYTES, self.dtype

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def segment_bytes(self) -> int:
        """One page, one KV head, all layers of the group: the unit of fetching and of the digest."""
        return self.layers * self.parts * self.page_size * self.head_dim * self.item_bytes

    @property
    def page_bytes(self) -> int:
        return self.kv_heads * self.segment_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def digest(self) -> str:
        """Equal digests mean that pages move as they are."""
        shape = (self.kv_heads, self.layers, self.parts, self.page_size, self.head_dim, self.dtype)
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
