"""Philox4x32-10: random bits as a pure function of a counter and a key, the same on every device.

    counter: four words, key: two words (unsigned, 32 bits each, as uint64 arrays that broadcast)  →  four words

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Being stateless, a token's noise
does not depend on what else is in the batch, and a replay on another machine draws it again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """One block of four 32-bit words for each counter."""
    a, b, c, d = counter
    key_0, key_1 = key
    assert 0 <= key_0 < 2**32 and 0 <= key_1 < 2**32, key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (right >> _HALF) ^ b ^ np.uint64(key_0),
            right & _LOW,
            (left >> _HALF) ^ d ^ np.uint64(key_1),
            left & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d


def philox_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The same in whole numbers, one block at a time."""
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        keys = [(key[i] + turn * _WEYL[i]) % 2**32 for i in (0, 1)]
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = right // 2**32 ^ b ^ keys[0], right % 2**32, left // 2**32 ^ d ^ keys[1], left % 2**32
    return a, b, c, d
