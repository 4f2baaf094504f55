"""What the figures mean: pure functions from the outcomes of all requests to one summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from baton.bench.stream import Outcome
from core.errors import ConfigError

SLO_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Spread:
    """How one latency is distributed, in milliseconds."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Failed requests count in `failed` only."""

    completed: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    goodput_per_s: float | None  # requests per second that kept every bound of the SLO; None without one
    errors: Mapping[str, int]  # why requests failed, and how many for each reason


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of the sorted values lies, interpolated between neighbours."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values_s: Iterable[float]) -> Spread:
    """The spread of some seconds; zeros when there are none."""
    ordered = sorted(value * 1e3 for value in values_s) or [0.0]
    return Spread(
        mean_ms=math.fsum(ordered) / len(ordered),
        p50_ms=percentile(ordered, 0.50),
        p90_ms=percentile(ordered, 0.90),
        p99_ms=percentile(ordered, 0.99),
    )


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=500,tpot=50` as milliseconds by name. Raises ConfigError for anything else."""
    bounds_ms: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            bounds_ms[name] = float(value)
        except ValueError:
            bounds_ms[name] = math.nan
        if name not in SLO_NAMES or not bounds_ms[name] > 0:
            raise ConfigError(f"--slo must be like ttft=500,tpot=50 (ms; of {', '.join(SLO_NAMES)}), got {text!r}")
    return bounds_ms


def keeps(outcome: Outcome, slo_ms: Mapping[str, float]) -> bool:
    """Whether one request kept every bound."""
    values_s = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}
    return all(values_s[name] * 1e3 <= bound_ms for name, bound_ms in slo_ms.items())


def summarize(outcomes: Sequence[Outcome], duration_s: float, slo_ms: Mapping[str, float] | None = None) -> Summary:
    """The figures of a run that took `duration_s` from its first request to its last answer."""
    good = [outcome for outcome in outcomes if not outcome.error]
    input_tokens = sum(outcome.input_tokens for outcome in good)
    output_tokens = sum(outcome.output_tokens for outcome in good)
    return Summary(
        completed=len(good),
        failed=len(outcomes) - len(good),
        duration_s=duration_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(input_tokens + output_tokens) / duration_s,
        ttft=spread(outcome.ttft_s for outcome in good),
        tpot=spread(outcome.tpot_s for outcome in good if outcome.output_tokens > 1),
        itl=spread(gap for outcome in good for gap in outcome.itl_s),
        e2e=spread(outcome.e2e_s for outcome in good),
        goodput_per_s=sum(keeps(outcome, slo_ms) for outcome in good) / duration_s if slo_ms else None,
        errors=Counter(outcome.error for outcome in outcomes if outcome.error),
    )
