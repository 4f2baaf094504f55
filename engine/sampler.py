"""Chooses the next token of each row from its logits, and reports how likely the model held it.

The order of what happens to one row's logits [V], all in float32:

    penalties (from ids) → bias → suppressed and disallowed ids → greedy: the best
                                                                → / temperature → filters → best of logit + noise

Ties go to the lowest id. Logprobs are of the logits as the model gave them. A row whose logits are not finite, or that
has no id left to choose, is an error of that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.batch import RowResult, SampledToken, SampleSpec
from engine.filters import candidates
from kernels.gumbel import gumbel_noise


class Draw(NamedTuple):
    """One row of logits: `length` ids of the spec's history come before the token to be chosen."""

    spec: SampleSpec
    length: int


def sample_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> list[RowResult]:
    """[R, V] of any floating type and R draws → one result each, with one token per choice."""
    assert logits.dim() == 2 and logits.shape[0] == len(draws), (logits.shape, len(draws))
    if not draws:
        return []
    wide = logits.float()
    finite = wide.sum(-1).isfinite().tolist()  # one pass: a NaN or an infinity anywhere spoils the sum
    best = wide.argmax(-1).tolist()
    return [
        _row(wide[i], draw, best[i]) if finite[i] else RowResult(error="the model's logits are not finite")
        for i, draw in enumerate(draws)
    ]


def _row(logits: torch.Tensor, draw: Draw, best: int) -> RowResult:
    """logits [V]; `best` is their argmax."""
    spec, params = draw.spec, draw.spec.params
    if spec.allowed is not None and spec.allowed.shape != logits.shape:
        return RowResult(error=f"the mask of allowed tokens has the shape {list(spec.allowed.shape)}, not [V]")
    if is_plain(spec):
        ids = [best] * len(spec.choices) if params.is_greedy else _noisy(logits, draw)
    else:
        changed = adjusted(logits, spec, draw.length)
        top = int(changed.argmax())
        if changed[top] == -math.inf:
            return RowResult(error="no token is allowed here")
        ids = [top] * len(spec.choices) if params.is_greedy else _noisy(changed, draw)
    if params.logprobs is None:
        return RowResult(tuple(SampledToken(token_id) for token_id in ids))
    logprobs = logits.log_softmax(-1)
    top_logprobs = _most_likely(logprobs, params.logprobs)
    return RowResult(tuple(SampledToken(i, float(logprobs[i]), top_logprobs) for i in ids))


def is_plain(spec: SampleSpec) -> bool:
    """Nothing changes the logits before the temperature."""
    params = spec.params
    return not (params.has_penalties or params.logit_bias or spec.suppress or spec.allowed is not None)


def adjusted(logits: torch.Tensor, spec: SampleSpec, length: int) -> torch.Tensor:
    """A changed copy of [V]: penalties, bias, and -inf where a token may not come."""
    out, params = logits.clone(), spec.params
    vocabulary = len(out)
    if params.repetition_penalty != 1.0:
        seen, _ = _unique(spec.history[:length], vocabulary)
        value = out[seen]
        out[seen] = torch.where(value < 0, value * params.repetition_penalty, value / params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        seen, counts = _unique(spec.history[spec.prompt_tokens : length], vocabulary)
        out[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocabulary}
        out[torch.tensor(list(biases), dtype=torch.int64)] += torch.tensor(list(biases.values()))
    if spec.suppress:
        out[torch.tensor(spec.suppress)] = -math.inf
    if spec.allowed is not None:
        out.masked_fill_(~spec.allowed, -math.inf)
    return out


def _unique(ids: Sequence[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids and how often each stands there. Placeholders beyond the vocabulary have no logit."""
    values, counts = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
    inside = values < vocabulary
    return torch.from_numpy(values[inside]), torch.from_numpy(counts[inside].astype(np.float32))


def _noisy(logits: torch.Tensor, draw: Draw) -> list[int]:
    """One id per choice: the best of logit / temperature + Gumbel noise, among those that the filters leave."""
    ids, values = candidates(logits, draw.spec.params)
    chosen = []
    for choice in draw.spec.choices:
        noisy = values + gumbel_noise(ids, draw.spec.seed, choice, draw.length)
        chosen.append(int(ids[noisy.argmax()]))  # ids ascend and argmax is the first: the lowest id of a tie
    return chosen


def _most_likely(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Best first; of equals the lowest ids, also at the cut, which topk alone does not promise."""
    if not count:
        return ()
    least = logprobs.topk(min(count, len(logprobs))).values[-1]
    ids = (logprobs >= least).nonzero().view(-1)
    pairs = zip(ids.tolist(), logprobs[ids].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])
