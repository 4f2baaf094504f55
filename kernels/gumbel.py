"""Gumbel noise for sampling: argmax of (logit + noise) is a draw from softmax(logits).

    ids [C] int64, seed, choice, position, draw  →  noise [C] float32, a function of these alone

Uniforms have 24 bits and lie in the middle of their cell, so noise is bounded, NOISE_MIN .. NOISE_MAX: an id whose
logit is more than their distance below the best cannot win, and its noise need not be computed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kernels.philox import philox, philox_reference

NOISE_MIN = -math.log(25 * math.log(2))
NOISE_MAX = -math.log(-math.log1p(-(2.0**-25)))
REACH = NOISE_MAX - NOISE_MIN  # logits further than this below the best never win

_IDS_PER_BLOCK = 4


def gumbel_noise(
    ids: npt.NDArray[np.int64], seed: int, choice: int, position: int, draw: int = 0
) -> npt.NDArray[np.float32]:
    """Counter (id // 4, position, choice, draw), word id % 4; key: the seed's low and high half."""
    assert choice >= 0 and position >= 0 and draw >= 0, (choice, position, draw)
    block = ids // _IDS_PER_BLOCK
    # Many candidates share blocks: each block is computed once.
    blocks, place = np.unique(block, return_inverse=True) if ids.size > 64 else (block, np.arange(ids.size))
    fixed = (np.full(1, position, np.uint64), np.full(1, choice, np.uint64), np.full(1, draw, np.uint64))
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = np.stack(np.broadcast_arrays(*philox((blocks.astype(np.uint64), *fixed), key)))
    chosen = words[ids % _IDS_PER_BLOCK, place]
    uniform = ((chosen >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24
    return (-np.log(-np.log(uniform))).astype(np.float32)


def gumbel_noise_reference(token_id: int, seed: int, choice: int, position: int, draw: int = 0) -> float:
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    word = philox_reference((token_id // 4, position, choice, draw), key)[token_id % 4]
    return -math.log(-math.log((word // 256 + 0.5) / 2**24))
