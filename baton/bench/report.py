"""How a run is shown: a table for people, and a JSON document for everything that computes further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from baton.bench.metrics import Spread, Summary
from baton.bench.stream import Outcome

MAX_ERRORS_SHOWN = 5


def table(summary: Summary) -> str:
    """What `baton bench` prints."""
    lines = [
        _line("requests completed", f"{summary.completed:,}"),
        _line("requests failed", f"{summary.failed:,}"),
        _line("duration", f"{summary.duration_s:,.2f} s"),
        _line("input tokens", f"{summary.input_tokens:,}"),
        _line("output tokens", f"{summary.output_tokens:,}"),
        _line("request throughput", f"{summary.requests_per_s:,.2f} /s"),
        _line("output throughput", f"{summary.output_tokens_per_s:,.1f} tokens/s"),
        _line("total throughput", f"{summary.total_tokens_per_s:,.1f} tokens/s"),
    ]
    if summary.goodput_per_s is not None:
        lines.append(_line("goodput", f"{summary.goodput_per_s:,.2f} /s"))
    lines += ["", f"{'ms':22s}{'mean':>12s}{'p50':>12s}{'p90':>12s}{'p99':>12s}"]
    lines += [_latency("time to first token", summary.ttft), _latency("time per output token", summary.tpot)]
    lines += [_latency("inter-token latency", summary.itl), _latency("end to end", summary.e2e)]
    return "\n".join(lines)


def failures(summary: Summary) -> str:
    """Why requests failed, the most frequent reasons first; empty when none did."""
    ranked = sorted(summary.errors.items(), key=lambda item: -item[1])
    lines = [f"{count} x {reason}" for reason, count in ranked[:MAX_ERRORS_SHOWN]]
    if len(ranked) > MAX_ERRORS_SHOWN:
        lines.append(f"and {len(ranked) - MAX_ERRORS_SHOWN} other reasons")
    return "\n".join(lines)


def document(settings: Mapping[str, Any], summary: Summary, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `--json` writes: how the run was set, its figures, and each request, times counted from the first one."""
    start_s = min((outcome.sent_s for outcome in outcomes), default=0.0)
    return {
        "settings": dict(settings),
        "summary": asdict(summary),
        "requests": [_request(outcome, start_s) for outcome in outcomes],
    }


def _request(outcome: Outcome, start_s: float) -> dict[str, Any]:
    return {
        "sent_s": outcome.sent_s - start_s,
        "input_tokens": outcome.input_tokens,
        "output_tokens": outcome.output_tokens,
        "ttft_ms": outcome.ttft_s * 1e3 if outcome.chunks_s else None,
        "itl_ms": [gap_s * 1e3 for gap_s in outcome.itl_s],
        "error": outcome.error,
    }


def _line(name: str, value: str) -> str:
    return f"{name:22s}{value:>24s}"


def _latency(name: str, spread: Spread) -> str:
    values = (spread.mean_ms, spread.p50_ms, spread.p90_ms, spread.p99_ms)
    return f"{name:22s}" + "".join(f"{value:>12,.1f}" for value in values)
