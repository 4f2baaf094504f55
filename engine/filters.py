"""Which tokens can still be drawn: top-k, top-p, min-p and typical-p, each on what the one before it left.

All filters keep a value's equals, so the outcome does not depend on how a sort orders ties; only the end of a top-p
nucleus cuts between equals, by id. Ids that no noise could lift to the top are dropped too: noise is bounded.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from core.sampling import SamplingParams
from kernels.gumbel import REACH

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it float32 would divide by 0
ROUNDING = 1e-3  # float32 error of a sum of logit and noise, amply

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


def candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[Ids, Values]:
    """[V] → ascending ids [C] and their logits / temperature, less that of the best id of all."""
    scaled = (logits - logits.max()) / max(params.temperature, LEAST_TEMPERATURE)  # the best is 0: nothing overflows
    least = -math.inf
    if 0 < params.top_k < len(scaled):
        least = float(scaled.topk(params.top_k).values[-1])
    if params.typical_p < 1.0:
        ids, values = _at_least(scaled, least)  # its entropy is of the whole distribution
    else:
        ids, values = _at_least(scaled, max(least, -REACH - ROUNDING))
    if params.top_p < 1.0:
        kept = scaled if least == -math.inf else scaled[scaled >= least]
        ids, values = _nucleus(ids, values, float(kept.logsumexp(0)), params.top_p)
    if params.min_p > 0.0:
        likely = values >= math.log(params.min_p)
        ids, values = ids[likely], values[likely]
    if params.typical_p < 1.0:
        ids, values = _typical(ids, values, params.typical_p)
        near = values >= values.max() - REACH - ROUNDING
        ids, values = ids[near], values[near]
    return ids, values


def _at_least(scaled: torch.Tensor, least: float) -> tuple[Ids, Values]:
    ids = (scaled >= least if least > -math.inf else scaled > least).nonzero().view(-1)
    return ids.numpy(), scaled[ids].numpy()


def _nucleus(ids: Ids, values: Values, log_total: float, mass: float) -> tuple[Ids, Values]:
    """The most likely ids whose mass, without the last of them, is below `mass`."""
    order = np.argsort(-values, kind="stable")
    probabilities = np.exp(values[order] - np.float32(log_total))
    before = np.cumsum(probabilities) - probabilities
    before[0] = 0.0
    kept = np.sort(order[before < mass])
    return ids[kept], values[kept]


def _typical(ids: Ids, values: Values, mass: float) -> tuple[Ids, Values]:
    """Those whose surprise is nearest to the entropy (Meister et al., 2022), until `mass` is reached."""
    logprobs = values - np.float32(np.logaddexp.reduce(values.astype(np.float64)))
    probabilities = np.exp(logprobs)
    distance = np.abs(-logprobs + np.sum(logprobs * probabilities))
    order = np.argsort(distance, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    before[0] = 0.0
    furthest = distance[order[np.count_nonzero(before < mass) - 1]]
    kept = distance <= furthest
    return ids[kept], values[kept]
