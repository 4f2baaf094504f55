"""The secret that all services of a cluster share: how it is written down, and the keys that are derived from it.

A file holds one or two keys, each 32 bytes or more as hexadecimal digits on a line of its own. Tickets are signed with
the first and accepted under any. To change a key: give every worker `new` after `old`, then every router `new` before
`old`, then drop `old`.
"""

from __future__ import annotations

import blake3

from core.errors import ConfigError

MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 64
MAX_KEYS = 2
DIGEST_CONTEXT = "baton v1 2026-11 digests of key-value pages"  # names the purpose: never used for another


def read_keys(text: str, where: str) -> tuple[bytes, ...]:
    """The keys of a file's text. Raises ConfigError, which names `where` and never shows what was read."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_KEYS:
        raise ConfigError(f"{where}: needs one key, or two while they change, each on a line; found {len(lines)}")
    try:
        keys = tuple(bytes.fromhex(line) for line in lines)
    except ValueError:
        raise ConfigError(f"{where}: a key is written as hexadecimal digits") from None
    if not all(MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES for key in keys):
        raise ConfigError(f"{where}: a key has {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes, two digits each")
    return keys


def digest_key(key: bytes) -> bytes:
    """The 32 bytes that key the digests of pages. They tell nothing about the key that they come from."""
    return blake3.blake3(key, derive_key_context=DIGEST_CONTEXT).digest()
