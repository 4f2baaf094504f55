"""Block hashes: the name of a page's content, chained over units of 16 token ids.

H(parent, ids, extra) is BLAKE2b with a 16-byte digest (RFC 7693), keyed by nothing: the root carries the identity of
the model, the adapter and the tenant's salt, so that two tenants, models or adapters never share a name.
Only the server computes them; a key that a client supplies is mixed into the salt and never used as a name.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from core.layout import HASH_UNIT_TOKENS

HASH_BYTES = 16


def root_hash(identity: str, adapter: str = "", salt: bytes = b"") -> bytes:
    """The parent of a prompt's first unit. Each field is length-prefixed, so that no two roots read alike."""
    h = hashlib.blake2b(digest_size=HASH_BYTES)
    for field in (identity.encode(), adapter.encode(), salt):
        h.update(len(field).to_bytes(4, "little"))
        h.update(field)
    return h.digest()


def unit_hash(parent: bytes, ids: Sequence[int], extra: bytes = b"") -> bytes:
    """The chain value after one unit of HASH_UNIT_TOKENS ids."""
    assert len(ids) == HASH_UNIT_TOKENS, len(ids)
    return hashlib.blake2b(parent + array("I", ids).tobytes() + extra, digest_size=HASH_BYTES).digest()


def block_hashes(root: bytes, ids: Sequence[int], page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The chain value at the end of each full page of `ids`; `known` are the first ones, not computed again."""
    hashes = list(known)
    value = hashes[-1] if hashes else root
    for page in range(len(hashes), len(ids) // page_size):
        for start in range(page * page_size, (page + 1) * page_size, HASH_UNIT_TOKENS):
            value = unit_hash(value, ids[start : start + HASH_UNIT_TOKENS])
        hashes.append(value)
    return hashes
