"""Chooses tokens on the device where it can, and by the CPU's sampler where it must; waits only when asked.

On the device: greedy, temperature, top-k, top-p and min-p. By the CPU, from a copy of the row's logits: penalties,
bias, suppressed ids and masks, logprobs, typical-p. Both choose the same token from the same logits, but for what
kernels/gpu/sample.py says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batch import RowResult, SampledToken
from engine.device_copy import HostCopy, to_device
from engine.sampler import Draw, is_plain, sample_rows
from kernels.gpu import sample as kernel

NOT_FINITE = "the model's logits are not finite"


def on_device(draw: Draw) -> bool:
    params = draw.spec.params
    return is_plain(draw.spec) and params.logprobs is None and params.typical_p >= 1.0


class Sampling:
    """The tokens of one step, on their way. `results` may be called once."""

    def __init__(self, logits: torch.Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> None:
        """logits [M, V]; draw i is from row `rows[i]`."""
        self._draws = draws
        self._near = [on_device(draw) for draw in draws]
        packed = [each for i, row in enumerate(rows) if self._near[i] for each in _choices(draws[i], row)]
        far = [row for row, near in zip(rows, self._near, strict=True) if not near]
        self.rows: torch.Tensor | None = None  # [C] int64 on the device, the rows of `ids`
        self.ids: torch.Tensor | None = None  # [C] int64 on the device, one per choice
        self._ids: HostCopy | None = None
        self._logits = HostCopy(logits[far]) if far else None
        if packed:
            given = to_device(kernel.pack_draws(packed), logits.device)
            noise, filters = any(each.temperature > 0.0 for each in packed), any(each.filters for each in packed)
            self.ids = kernel.sample(logits, given, noise, filters)
            self.rows = given[:, 0].long()
            self._ids = HostCopy(self.ids)

    def results(self) -> list[RowResult]:
        """One per draw, in order. Waits for the device."""
        ids = iter([] if self._ids is None else self._ids.take().tolist())
        far = [draw for draw, near in zip(self._draws, self._near, strict=True) if not near]
        others = iter([] if self._logits is None else sample_rows(self._logits.take(), far))
        found = []
        for draw, near in zip(self._draws, self._near, strict=True):
            found.append(_result([next(ids) for _ in draw.spec.choices]) if near else next(others))
        return found


def _choices(draw: Draw, row: int) -> list[kernel.Draw]:
    params, seed = draw.spec.params, draw.spec.seed
    filters = (params.temperature, params.top_k, params.top_p, params.min_p)
    return [kernel.Draw(row, *filters, seed, choice, draw.length) for choice in draw.spec.choices]


def _result(ids: list[int]) -> RowResult:
    if min(ids) < 0:
        return RowResult(error=NOT_FINITE)
    return RowResult(tuple(SampledToken(token_id) for token_id in ids))
