"""Few cases in which every two values of every two axes still meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

TRIES = 30  # random cases of which the one with the most new pairs is taken


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases {axis: value}, the same at each call."""
    rng = random.Random(seed)
    names = list(axes)
    sizes = [range(len(axes[name])) for name in names]
    missing = {
        (one, i, other, j)
        for (one, ones), (other, others) in itertools.combinations(enumerate(sizes), 2)
        for i in ones
        for j in others
    }
    cases = []
    while missing:
        one, i, other, j = min(missing)
        best: list[int] = []
        most = -1
        for _ in range(TRIES):
            choice = [rng.choice(size) for size in sizes]
            choice[one], choice[other] = i, j
            if (new := len(missing & _pairs(choice))) > most:
                best, most = choice, new
        missing -= _pairs(best)
        cases.append({name: axes[name][index] for name, index in zip(names, best, strict=True)})
    return cases


def _pairs(choice: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(one, i, other, j) for (one, i), (other, j) in itertools.combinations(enumerate(choice), 2)}
