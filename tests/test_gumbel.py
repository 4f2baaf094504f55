"""Noise is a pure function of its key, bounded, and Gumbel distributed; Philox gives the published words."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kernels.gumbel import NOISE_MAX, NOISE_MIN, gumbel_noise, gumbel_noise_reference
from kernels.philox import philox, philox_reference

# counter, key, words: the known answers that the generator's authors publish with it (Random123, philox4x32 10)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    a, b, c, d = (np.full(3, word, dtype=np.uint64) for word in counter)
    assert [word.tolist() for word in philox((a, b, c, d), key)] == [[word] * 3 for word in words]
    assert philox_reference(counter, key) == words


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 3000])
def test_noise_equals_the_reference_for_any_set_of_ids(count: int) -> None:
    ids = np.array(sorted(random.Random(count).sample(range(200_000), count)), dtype=np.int64)
    for seed in (0, -1, -(2**63), 2**63 - 1, 12345):
        noise = gumbel_noise(ids, seed, choice=3, position=77, draw=1)
        assert noise.dtype == np.float32
        expected = [gumbel_noise_reference(i, seed, 3, 77, 1) for i in ids.tolist()[:200]]
        np.testing.assert_allclose(noise[:200], expected, rtol=1e-6)


def test_an_ids_noise_does_not_depend_on_the_other_ids() -> None:
    every = gumbel_noise(np.arange(1000), 5, 0, 9)
    some = np.arange(3, 1000, 7)
    assert np.array_equal(gumbel_noise(some, 5, 0, 9), every[some])


def test_each_part_of_the_key_changes_the_noise() -> None:
    ids = np.arange(100)
    drawn = [
        gumbel_noise(ids, *key) for key in [(1, 0, 0, 0), (2, 0, 0, 0), (1 << 40, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0)]
    ]
    drawn.append(gumbel_noise(ids, 1, 0, 0, 1))
    assert len({values.tobytes() for values in drawn}) == len(drawn)


def test_noise_is_bounded_and_has_gumbels_mean_and_variance() -> None:
    noise = gumbel_noise(np.arange(400_000), 8, 0, 1).astype(np.float64)
    assert np.float32(NOISE_MIN) <= noise.min() and noise.max() <= np.float32(NOISE_MAX)
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
