"""The signals of a tier: those of its workers, as they wrote them in their reports, folded into one.

Sums where the tier is a sum (tokens, pages, refusals); the worst worker for waits, since a queue is a worker's own; the
mean over what is decoded for gaps, and over those that have measured it for what one worker can do.

A worker that drains takes nothing new: it is not among the ready ones and its room is not counted, but what a decode
worker still holds is, since that may have to go elsewhere.

Reports come from other processes. One that lacks a number, or that has one which is negative or not finite, is left out
whole, as if the worker had said nothing: a decision from half a report would be a guess. `baton.worker_signals` lists
the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from baton.scaling.decode import DecodeSignals
from baton.scaling.prefill import PrefillSignals

Numbers = Mapping[str, float]

PREFILL = ("draining", "arriving_tokens_per_s", "queued_tokens", "queue_wait_s", "first_token_s", "tokens_per_s")
DECODE = ("draining", "projected_pages", "pages_total", "running", "token_gap_s", "refused_grants_per_s")


def prefill_signals(workers: Iterable[Numbers]) -> PrefillSignals:
    """`workers`: the newest numbers of each worker of the tier. Of none: nothing is ready, nothing asked for."""
    whole = [numbers for numbers in workers if _is_whole(numbers, PREFILL)]
    ready = [numbers for numbers in whole if not numbers["draining"]]
    rates = [numbers["tokens_per_s"] for numbers in whole if numbers["tokens_per_s"]]
    return PrefillSignals(
        ready=len(ready),
        arriving_tokens_per_s=_sum(ready, "arriving_tokens_per_s"),
        queued_tokens=round(_sum(ready, "queued_tokens")),
        queue_wait_s=_worst(ready, "queue_wait_s"),
        first_token_s=_worst(ready, "first_token_s"),
        tokens_per_s=sum(rates) / len(rates) if rates else 0.0,
    )


def decode_signals(workers: Iterable[Numbers]) -> DecodeSignals:
    """See `prefill_signals`."""
    whole = [numbers for numbers in workers if _is_whole(numbers, DECODE)]
    ready = [numbers for numbers in whole if not numbers["draining"]]
    sized = ready or whole
    return DecodeSignals(
        ready=len(ready),
        projected_pages=round(_sum(whole, "projected_pages")),
        pages_per_worker=round(_sum(sized, "pages_total") / len(sized)) if sized else 0,
        running=round(_sum(whole, "running")),
        token_gap_s=_gap_s(ready),
        refused_grants_per_s=_sum(ready, "refused_grants_per_s"),
    )


def _gap_s(ready: list[Numbers]) -> float:
    running = _sum(ready, "running")
    return math.fsum(numbers["token_gap_s"] * numbers["running"] for numbers in ready) / running if running else 0.0


def _is_whole(numbers: Numbers, names: tuple[str, ...]) -> bool:
    """Every number is there and is one."""
    found = [numbers.get(name) for name in names]
    return all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in found)


def _sum(workers: Iterable[Numbers], name: str) -> float:
    return math.fsum(numbers[name] for numbers in workers)


def _worst(workers: Iterable[Numbers], name: str) -> float:
    return max((numbers[name] for numbers in workers), default=0.0)
