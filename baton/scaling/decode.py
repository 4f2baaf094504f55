"""How many decode workers: enough pages for what runs and what is promised, and batches small enough for the gap
between tokens.

    by pages   projected pages / (pages of a worker x the share that may be full)
    by ITL     ready workers x ITL / (its target x the share of it that may be used); no more than doubled
    by grants  one more than are ready, while prompts that are computed, or could be, find no room

A worker's ITL is taken to grow in proportion to its batch, which overstates the need a little when batches are small
(part of a step does not depend on the batch) and never understates it. What is promised counts from the moment that a
prompt is submitted: a burst shows here while the prefill tier still computes, which is the time that a worker takes
to start.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.scaling.steady import Need


@dataclass(frozen=True, slots=True)
class DecodeSignals:
    """Of the whole tier, over the last seconds."""

    ready: int
    projected_pages: int  # held, and what those that run and those that are promised are expected to take yet
    pages_per_worker: int
    running: int  # sequences that are decoded
    token_gap_s: float  # 90th percentile of ITL
    refused_grants_per_s: float


@dataclass(frozen=True, slots=True)
class DecodeTarget:
    token_gap_s: float = 0.1
    full_share: float = 0.85
    gap_share: float = 0.8  # batches go on growing while another worker starts
    refused_per_s: float = 0.5  # fewer are a moment's coincidence


def decode_need(signals: DecodeSignals, target: DecodeTarget) -> Need:
    """The largest of the three needs, with its reason."""
    room = max(1.0, signals.pages_per_worker * target.full_share)
    pages = signals.projected_pages / room
    needs = [Need(pages, f"{signals.projected_pages} pages projected: {pages:.1f} workers of {room:.0f}")]
    if signals.running:
        by_gap = signals.ready * signals.token_gap_s / (target.token_gap_s * target.gap_share)
        reason = (
            f"ITL is {signals.token_gap_s * 1000:.0f} ms with {signals.ready} workers,"
            f" against {target.token_gap_s * 1000:.0f} ms"
        )
        needs.append(Need(min(by_gap, 2.0 * signals.ready), reason))
    if signals.refused_grants_per_s > target.refused_per_s:
        needs.append(Need(signals.ready + 1.0, f"{signals.refused_grants_per_s:.1f} grants a second find no room"))
    return max(needs, key=lambda need: need.workers)
